"""Tests of `autoreg_vit.settings`."""
