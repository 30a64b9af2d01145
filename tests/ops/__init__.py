"""Tests of `autoreg_vit.ops`."""
