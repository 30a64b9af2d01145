"""Tests of `autoreg_vit.hub`."""
