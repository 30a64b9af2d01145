"""Tests of `autoreg_vit.models`."""
