"""Tests of `autoreg_vit.engine`."""
