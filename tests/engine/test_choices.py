"""What a run does where its settings say auto: what pays on its device, what it began with, and what is left where it
fails."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip('sklearn')

from PIL import Image
from torch import nn

from autoreg_vit.commands import PretrainConfig, pretrain
from autoreg_vit.commands.pretraining import Pretraining
from autoreg_vit.commands.recipes import bundled_recipes, load_recipe
from autoreg_vit.data import on_device, pretraining
from autoreg_vit.data.on_device import suits_device
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine import trainer
from autoreg_vit.engine.choices import Choices, Work, begun_with, cannot_capture, choose
from autoreg_vit.engine.graph import GraphedStep
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.run import setting_differences
from autoreg_vit.errors import ConfigError, DataError
from autoreg_vit.models import create_pretraining_model
from autoreg_vit.settings.base import save_config
from tests.data.test_device_data import Pictures
from tests.support.launching import SETTINGS, log_of, weights_of

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
LONG, SHORT = Work(100_000, 1e14), Work(50, 1e10)
#: Compiling saves 40 seconds of it on an H100.
MEDIUM = Work(5000, 1e12)
NOTHING, BOTH = Choices(), Choices(compile=True, cuda_graph=True)


@pytest.fixture
def card(monkeypatch) -> Processes:
    """One process on a GPU that is not there, an H100 as far as anybody asks."""
    make_card(monkeypatch, (9, 0), memory_clock_rate=2_619_000, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (80 << 30, 80 << 30))
    return Processes(CUDA)


def make_card(monkeypatch, capability: tuple[int, int], **properties: int) -> None:
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(**properties))


def chosen(group: Processes, work: Work = LONG, **settings) -> Choices:
    return choose(PretrainConfig(**settings), group, work, lambda text: None)


class TestWhatPays:
    def test_on_a_gpu_by_the_length_of_the_run(self, card: Processes):
        assert chosen(card) == BOTH
        assert chosen(card, SHORT) == NOTHING
        assert chosen(card, MEDIUM) == Choices(cuda_graph=True)

    def test_by_how_fast_the_memory_is(self, card: Processes, monkeypatch):
        """A T4 has a tenth of an H100's, and one that does not tell is taken for an H100."""
        make_card(monkeypatch, (7, 5), memory_clock_rate=5_001_000, memory_bus_width=256)
        assert chosen(card, MEDIUM) == BOTH and chosen(card, SHORT) == NOTHING
        make_card(monkeypatch, (7, 5), memory_clock_rate=0, memory_bus_width=0)
        assert chosen(card, MEDIUM) == Choices(cuda_graph=True) and chosen(card) == BOTH

    def test_work_is_what_norms_read(self, monkeypatch, tmp_path: Path):
        seen: list[tuple[Work, int]] = []

        def note(self, config, objective, batches, group):
            choose = mock.Mock(return_value=NOTHING)
            with mock.patch.object(trainer, 'choose', choose):
                init(self, config, objective, batches, group)
            values: list[int] = []
            for module in objective.model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.register_forward_hook(lambda norm, arguments, out: values.append(out.numel()))
            objective.model(torch.zeros(1, 1, 8, 8))
            seen.append((choose.call_args.args[2], sum(values)))
            raise StopIteration

        init = trainer.Trainer.__init__
        monkeypatch.setattr(trainer.Trainer, '__init__', note)
        with pytest.raises(StopIteration):
            pretrain(PretrainConfig(**{**SETTINGS, 'dataset': 'digits', 'output_dir': str(tmp_path / 'run')}))
        (work, values), = seen
        assert work == Work(30, 30 * 16 * values)

    @pytest.mark.parametrize('name', sorted({*bundled_recipes()} - {'digits'}))
    def test_bundled_recipes_take_all_flags(self, name: str, card: Processes):
        """Without a word on an H100, where a run that says nothing is then as fast as one that says everything."""
        config = PretrainConfig(**load_recipe(name))
        images = 50_000 if 'cifar' in name else 126_689 if '100' in name else 1_281_167
        with torch.device('meta'):
            model = create_pretraining_model(config.model, **config.model_options())
        steps = config.length(images // config.images_per_step).steps
        objective = Pretraining(config, model, ImageSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3), None, Processes(CPU))
        values = steps * config.images_per_step * objective.normed_values_per_image
        assert choose(config, card, Work(steps, values), pytest.fail) == BOTH

    def test_what_a_graph_cannot_hold(self, card: Processes):
        for settings in ({'opt': 'lamb'}, {'fsdp': True}):
            assert chosen(card, **settings) == Choices(compile=True)
            assert cannot_capture(PretrainConfig(**settings), card)
        assert chosen(card, accumulate=4) == BOTH

    def test_several_processes_capture_where_it_is_asked_for(self, card: Processes):
        two = Processes(CUDA, 0, 2)
        assert chosen(two) == Choices(compile=True)
        assert chosen(two, cuda_graph=True) == BOTH and not cannot_capture(PretrainConfig(), two)

    def test_old_gpus_and_cpus(self, card: Processes, monkeypatch):
        assert chosen(Processes(CPU)) == NOTHING
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (6, 1))
        assert chosen(card) == Choices(cuda_graph=True)

    def test_what_is_asked_for_is_done(self, card: Processes):
        assert chosen(card, SHORT, compile=True, cuda_graph=True) == BOTH
        assert chosen(card, compile=False, cuda_graph=False) == NOTHING

    @pytest.mark.parametrize('size, count, suits', [((16, 12), 8, True), ((40, 40), 8, False), ((16, 12), 0, False)])
    def test_images_on_the_device(self, size, count, suits, card: Processes, monkeypatch):
        spec = ImageSpec((16, 16), 3, (0.5,) * 3, (0.5,) * 3)
        assert suits_device(Pictures(count, size), spec, CUDA) is suits
        monkeypatch.setattr(on_device, 'MOST_UNASKED', 7)
        assert not suits_device(Pictures(8), spec, CUDA) and suits_device(Pictures(7), spec, CUDA)
        monkeypatch.setattr(on_device, 'MOST_UNASKED', 8)
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (4 * 8 * 16 * 12 * 3 - 1, 80 << 30))
        assert not suits_device(Pictures(8), spec, CUDA)

    @pytest.mark.parametrize('asked', ['auto', True])
    def test_images_of_several_sizes(self, asked, tmp_path: Path, monkeypatch):
        """Found while they are loaded: a run that was not asked to keep them reads files instead."""
        for number, size in enumerate([(8, 8)] * 8 + [(8, 6)]):
            Image.new('L', size).save(tmp_path / f'{number}.png')
        monkeypatch.setattr(pretraining, 'begun_with', lambda folder, config_class: {})
        monkeypatch.setattr(pretraining, 'suits_device', lambda *arguments: True)
        monkeypatch.setattr(on_device, '_check_memory', lambda *arguments: None)
        config = PretrainConfig(dataset='folder', data_dir=str(tmp_path), batch_size=2, crop_scale=(0.2, 1.0),
                                reader='pil', cache_on_device=asked)
        spec = ImageSpec((8, 8), 1, (0.5,), (0.5,))
        if asked is True:
            with pytest.raises(DataError, match='images of one size'):
                pretraining.training_batches(config, spec, Processes(CUDA))
        else:
            assert not pretraining.training_batches(config, spec, Processes(CUDA)).on_device

    def test_a_value_that_is_none_of_the_three(self):
        with pytest.raises(ConfigError, match="compile is true, false or auto, got 'yes'"):
            PretrainConfig(compile='yes')


class TestWhatItBeganWith:
    def write(self, folder: Path, choices: dict[str, bool] | None = None, **settings) -> str:
        folder.mkdir()
        save_config(PretrainConfig(**settings), folder / 'config.yaml')
        lines = [{'event': 'start', **({'choices': choices} if choices else {})}, {'event': 'step'}]
        (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return str(folder)

    def choices_of(self, folder: Path | str) -> dict[str, bool]:
        begun = begun_with(folder, PretrainConfig)
        return {name: begun[name] for name in Choices._fields if name in begun}

    def test_wins(self, card: Processes, tmp_path: Path):
        folder = self.write(tmp_path / 'run', NOTHING._asdict())
        assert self.choices_of(folder) == NOTHING._asdict()
        assert begun_with(None, PretrainConfig) == begun_with(str(tmp_path), PretrainConfig) == {}
        assert chosen(card, output_dir=folder) == NOTHING
        folder = self.write(tmp_path / 'other', BOTH._asdict())
        assert chosen(card, SHORT, output_dir=folder) == BOTH

    def test_before_there_was_a_choice(self, card: Processes, tmp_path: Path):
        """config.yaml of such a run says false."""
        folder = self.write(tmp_path / 'run', compile=False, cuda_graph=False, cache_on_device=False)
        assert chosen(card, output_dir=folder) == NOTHING

    def test_where_it_is_not_possible(self, tmp_path: Path):
        folder, said = self.write(tmp_path / 'run', BOTH._asdict()), []
        assert choose(PretrainConfig(output_dir=folder), Processes(CPU), LONG, said.append) == Choices(compile=True)
        assert len(said) == 1 and 'began with cuda_graph, and goes on without it: a CUDA graph needs a' in said[0]

    def test_wins_where_it_would_not_be_chosen(self, tmp_path: Path):
        """Compiling works on a CPU where it is asked for, and a resume of such a run goes on with it."""
        folder = self.write(tmp_path / 'run', Choices(compile=True)._asdict(), compile=True)
        assert choose(PretrainConfig(output_dir=folder), Processes(CPU), SHORT, pytest.fail) == Choices(compile=True)
        assert chosen(Processes(CPU)) == NOTHING

    def test_is_no_difference_of_settings(self, tmp_path: Path):
        folder = Path(self.write(tmp_path / 'run', NOTHING._asdict()))
        before = dict.fromkeys(['compile', 'cuda_graph', 'cache_on_device', 'reader', 'residual_in_fp32'], 'auto')
        assert not setting_differences(before, PretrainConfig(), folder)
        assert not setting_differences({**before, 'compile': False}, PretrainConfig(), folder)
        assert not setting_differences(before, PretrainConfig(compile=False), folder)
        assert setting_differences(before, PretrainConfig(compile=True), folder) == ['compile: was False, is True']


@pytest.mark.usefixtures('no_figures')
class TestWhatFails:
    """Is left, with a warning that names the cause, where it was chosen, and is an error where it was asked for."""

    @pytest.fixture
    def plain(self, tmp_path: Path) -> Path:
        return self.run(tmp_path / 'plain')

    def run(self, folder: Path, **settings) -> Path:
        return pretrain(PretrainConfig(**{**SETTINGS, 'epochs': 1, 'eval_every': 0, 'accumulate': 2, 'batch_size': 16,
                                          'train_images': 360, 'checkpoint_every_steps': 0, **settings,
                                          'output_dir': str(folder)}))

    def choosing(self, choices: Choices, monkeypatch) -> None:
        monkeypatch.setattr(trainer, 'choose', lambda *arguments: choices)
        monkeypatch.setattr(trainer, 'cannot_capture', lambda *arguments: '')

    @pytest.mark.parametrize('late', [False, True])
    def test_compiling(self, late: bool, plain: Path, tmp_path: Path, monkeypatch, capsys):
        def compile(network):
            if not late:
                raise RuntimeError('no\ncompiler')
            broken = mock.Mock(spec=network, side_effect=RuntimeError('no\ncompiler'))
            return broken

        monkeypatch.setattr(torch, 'compile', compile)
        with pytest.raises(ConfigError, match=r'--compile failed \(RuntimeError: no compiler\): leave it out'):
            self.run(tmp_path / 'asked', compile=True)
        self.choosing(Choices(compile=True), monkeypatch)
        folder = self.run(tmp_path / 'chosen')
        assert 'Going on without --compile, which failed (RuntimeError: no compiler).' in capsys.readouterr().out
        assert log_of(folder)[0]['choices'] == NOTHING._asdict() and weights_of(folder) == weights_of(plain)

    def test_capturing(self, card: Processes, tmp_path: Path, monkeypatch, capsys):
        """On a CPU, with CUDA's streams stood in for: the steps around the capture are the real ones, of two forward
        passes each, with AdamW as a graph wants it."""
        for name in ('Stream', 'current_stream'):
            monkeypatch.setattr(torch.cuda, name, mock.Mock())
        monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
        self.choosing(Choices(cuda_graph=True), monkeypatch)
        with monkeypatch.context() as never:
            never.setattr(GraphedStep, 'warm_up', 10 ** 9)
            warm = self.run(tmp_path / 'warm')
        monkeypatch.setattr(GraphedStep, '_captured', mock.Mock(side_effect=RuntimeError('not permitted')))
        folder = self.run(tmp_path / 'chosen')
        assert 'Going on without --cuda-graph, which failed (RuntimeError: not permitted).' in capsys.readouterr().out
        assert weights_of(folder) == weights_of(warm)
        losses = [[line['loss'] for line in log_of(run) if line['event'] == 'step'] for run in (warm, folder)]
        assert losses[0] == losses[1] and len(losses[0]) == 3
        assert log_of(folder)[0]['choices'] == Choices(cuda_graph=True)._asdict()
        assert [line['choices'] for line in log_of(folder) if line['event'] == 'choices'] == [NOTHING._asdict()]
        # A resume on a GPU does not try again.
        assert torch.load(folder / 'last.pt')['choices'] == NOTHING._asdict()
        assert not chosen(card, output_dir=str(folder)).cuda_graph
        with pytest.raises(ConfigError, match=r'--cuda-graph failed \(RuntimeError: not permitted\): leave it out'):
            self.run(tmp_path / 'asked', cuda_graph=True)
