"""Devices and precisions: what `auto` chooses, and what is refused."""

import pytest
import torch

from autoreg_vit.engine import machine as runtime
from autoreg_vit.errors import ConfigError


def test_bfloat16_only_where_it_is_native(monkeypatch):
    cpu = torch.device('cpu')
    assert runtime.resolve_precision('bfloat16', cpu) == 'bfloat16'
    for check in ('_is_amx_tile_supported', '_is_avx512_bf16_supported'):
        monkeypatch.setattr(torch.cpu, check, lambda: False)
    assert runtime.resolve_precision('auto', cpu) == 'float32'
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True)
    assert runtime.resolve_precision('auto', cpu) == 'bfloat16'


class TestDevices:
    @pytest.mark.parametrize('kind', ['cuda', 'mps', 'xpu'])
    def test_that_are_not_there(self, kind: str, monkeypatch):
        monkeypatch.setitem(runtime.DEVICES, kind, lambda: 0)
        with pytest.raises(ConfigError, match=f"'{kind}' is not there: PyTorch sees 0 .* --device cpu"):
            runtime.resolve_device(kind)
        monkeypatch.setitem(runtime.DEVICES, kind, lambda: 1)
        assert runtime.resolve_device(f'{kind}:0').type == kind
        with pytest.raises(ConfigError, match=f"'{kind}:1' is not there: PyTorch sees 1 "):
            runtime.resolve_device(f'{kind}:1')

    @pytest.mark.parametrize('name', ['cpuu', 'cdua', 'gpu', 'CPU:', 'meta', 'vulkan', 'cuda:-1', 'cuda:x', ''])
    def test_that_are_misspelt_or_do_not_train(self, name: str):
        with pytest.raises(ConfigError, match=f"evice '{name}'"):
            runtime.resolve_device(name)

    def test_a_second_processor_is_none(self):
        with pytest.raises(ConfigError, match='PyTorch sees 1 of the kind cpu'):
            runtime.resolve_device('cpu:1')
