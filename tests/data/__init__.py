"""Tests of `autoreg_vit.data`."""
