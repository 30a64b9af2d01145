"""Tests of `autoreg_vit.evaluation`."""
