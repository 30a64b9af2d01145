"""Checkpoints survive whatever happens while they are written, and damage is named."""

import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

from autoreg_vit import artifacts as checksums
from autoreg_vit.engine import checkpoints as checkpoint
from autoreg_vit.errors import CheckpointError


class TestCheckpointFiles:
    @pytest.mark.parametrize('moment', range(12))
    def test_killed_between_any_two_renames(self, moment: int, tmp_path: Path):
        """Of three saves, the last that was complete is there, or the one under way."""
        path, renames = tmp_path / 'last.pt', []
        child = os.fork()
        if child == 0:
            replace = os.replace

            def replace_or_die(*args):
                if len(renames) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                renames.append(args)
                replace(*args)

            os.replace = replace_or_die
            for step in range(3):
                checkpoint.save_checkpoint({'step': step}, path)
                (tmp_path / 'saved').write_text(str(step))
            os._exit(0)
        os.waitpid(child, 0)
        saved = int((tmp_path / 'saved').read_text()) if (tmp_path / 'saved').exists() else -1
        messages = []
        state = checkpoint.load_checkpoint(path, messages.append)
        assert messages == [] and (state['step'] if state else -1) in (saved, saved + 1)
        checkpoint.save_checkpoint({'step': 9}, path)
        assert checkpoint.load_checkpoint(path)['step'] == 9

    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        for step in range(2):
            checkpoint.save_checkpoint({'step': step, 'weights': torch.randn(1000)}, tmp_path / 'last.pt')
        return tmp_path / 'last.pt'

    @staticmethod
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    @staticmethod
    def truncate(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    @staticmethod
    def empty(path: Path) -> None:
        os.truncate(path, 0)

    @pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty'])
    def test_damage_falls_back_to_the_previous(self, damage: str, saved: Path):
        getattr(self, damage)(saved)
        messages = []
        assert checkpoint.load_checkpoint(saved, messages.append)['step'] == 0
        assert 'last.pt does not match its checksum' in messages[0] and 'last.previous.pt' in messages[0]
        getattr(self, damage)(checkpoint.previous_of(saved))
        with pytest.raises(CheckpointError, match='No whole checkpoint is left'):
            checkpoint.load_checkpoint(saved)

    @pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'text', 'pickle'])
    def test_every_failure_to_load_is_one_error(self, damage: str, saved: Path):
        if damage == 'text':
            saved.write_text('not a checkpoint')
        elif damage == 'pickle':
            torch.save({'step': random.Random(0)}, saved)  # an object, which only unsafe loading would make
        else:
            getattr(self, damage)(saved)
        if damage == 'flip':
            assert checkpoint.read_checksum(saved) != checkpoint.sha256_of(saved)
        else:
            with pytest.raises(CheckpointError, match=r'Cannot read the checkpoint .*last\.pt'):
                checkpoint.load_file(saved)

    def test_sha256sum_reads_the_checksums(self, saved: Path):
        for path in (saved, checkpoint.previous_of(saved)):
            assert checkpoint.checksum_path(path).read_text() == f'{checkpoint.sha256_of(path)}  {path.name}\n'
            checksums.verify_checksum(path)
        self.flip(saved)
        with pytest.raises(CheckpointError, match='does not match'):
            checksums.verify_checksum(saved)

    def test_checksum_missing(self, saved: Path):
        for path in saved.parent.glob('*.sha256'):
            path.unlink()
        with pytest.raises(CheckpointError, match=r'sha256sum last\.pt'):
            checkpoint.load_checkpoint(saved)

    def test_full_disk_leaves_the_last_good_one(self, saved: Path):
        """A limit on file sizes fails in the middle of a write, as a full disk does."""
        before = saved.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(CheckpointError, match=r'disk is full or a quota .*last good checkpoint'):
                checkpoint.save_checkpoint({'step': 2, 'weights': torch.randn(100_000)}, saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert saved.read_bytes() == before and checkpoint.load_checkpoint(saved)['step'] == 1
        assert not list(saved.parent.glob('*.new'))

    def test_only_regular_files(self, saved: Path):
        os.replace(saved, saved.with_name('elsewhere.pt'))
        saved.symlink_to('elsewhere.pt')
        with pytest.raises(CheckpointError, match='symbolic link'):
            checkpoint.save_checkpoint({'step': 2}, saved)
        saved.unlink()
        saved.mkdir()
        with pytest.raises(CheckpointError, match='is a folder'):
            checkpoint.save_checkpoint({'step': 2}, saved)
        saved.rmdir()
        os.mkfifo(saved)
        with pytest.raises(CheckpointError, match='is a pipe'):
            checkpoint.save_checkpoint({'step': 2}, saved)
