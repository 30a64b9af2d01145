"""Tests of `autoreg_vit.figures`."""
