"""`autoreg-vit export`: folders of weights from runs, finished and not, their cards, and the Hub."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path

import pytest
import timm
import torch

pytest.importorskip('sklearn')

import yaml
from safetensors.torch import load_file

from autoreg_vit.artifacts import sha256_of
from autoreg_vit.commands.cli import main
from autoreg_vit.data.transforms import ImageSpec, evaluation_transform
from autoreg_vit.engine.checkpoints import save_checkpoint
from autoreg_vit.hub import publishing as exporting
from autoreg_vit.hub.card import command, training_hours
from autoreg_vit.hub.golden import deviation, record
from autoreg_vit.models.pretrained import load_folder
from autoreg_vit.settings.pretraining import PretrainConfig
from tests.support.exporting import ENCODER, LINES, MODEL, write_run
from tests.support.launching import SETTINGS, flags, log_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / 'cifar10-4ep')
    return tmp_path / 'cifar10-4ep'


def export(*arguments: object) -> int:
    return main(['export', *map(str, arguments)])


def card_of(folder: Path) -> tuple[dict, str]:
    _, header, body = (folder / 'README.md').read_text(encoding='utf-8').split('---\n', 2)
    return yaml.safe_load(header), body


def test_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From pretraining by the command line to the weights in timm."""
    monkeypatch.setattr('autoreg_vit.commands.pretraining.draw_figures', lambda *arguments: None)
    assert main(flags({**SETTINGS, 'epochs': 1, 'output_dir': tmp_path / 'run'})) == 0
    assert export(tmp_path / 'run', tmp_path / 'weights', '--tag', 'digits_1ep') == 0

    encoder, whole = tmp_path / 'weights' / f'{ENCODER}.digits_1ep', tmp_path / 'weights' / f'{MODEL}.digits_1ep'
    trained = load_folder(tmp_path / 'run' / 'pretrain')
    loaded = load_folder(whole)
    assert deviation(record(loaded), record(trained)) < exporting.HALF_LIMIT
    assert loaded.pretrained_cfg['mean'] == trained.pretrained_cfg['mean']
    # What the run's own accuracies were measured on.
    seen = evaluation_transform(ImageSpec.of(trained)).transforms[1].transforms
    for model in (trained, loaded, timm.create_model(f'local-dir:{tmp_path / "run" / "encoder"}')):
        cfg = model.pretrained_cfg
        assert seen[0].size == int(cfg['input_size'][-1] / cfg['crop_pct'])
        assert seen[0].interpolation.value == cfg['interpolation']
        assert seen[-1].mean.tolist() == pytest.approx(list(cfg['mean']))
    alone = load_folder(encoder)
    assert deviation({'features': record(loaded)['features']}, record(alone)) < 1e-4

    body = card_of(encoder)[1]
    start = log_of(tmp_path / 'run')[0]
    assert "scikit-learn's digits, 240 images" in body
    assert f'commit {start["commit"] or "not recorded"},' in body and start['hardware'] in body
    assert main(['probe', '--weights', str(encoder), '--dataset', 'digits', '--fast', '--epochs', '1', '--knn', '0',
                 '--output-dir', str(tmp_path / 'probe')]) == 0
    assert export(tmp_path / 'run', tmp_path / 'weights', '--tag', 'digits_1ep', '--no-pretrain',
                  '--results', tmp_path / 'probe' / 'results.json') == 0
    assert '| linear probe of the mean of tokens on cached features, 10 classes |' in card_of(encoder)[1]


class TestFolders:
    def test_names_and_card(self, run: Path, tmp_path: Path):
        results = tmp_path / 'results.json'
        results.write_text(json.dumps({
            'weights': '/somewhere/encoder', 'pretrained': True, 'top1': 61.25, 'top5': 93.5, 'loss': 1.0,
            'knn': 50.125, 'train_images': 4000, 'test_images': 1000, 'num_classes': 10, 'fast': True,
            'classes': list('abcdefghij')}))
        untrained = tmp_path / 'untrained.json'
        untrained.write_text(json.dumps({'pretrained': False, 'top1': 21.5, 'epochs': 3, 'test_images': 1000}))
        assert export(run, tmp_path / 'out', '--data', 'CIFAR-10 as JPEG', '--data-id', 'uoft-cs/cifar10',
                      '--limits', 'Not for cats.', '--results', results, untrained) == 0

        assert {p.name for p in (tmp_path / 'out').iterdir()} == {f'{ENCODER}.cifar10-4ep', f'{MODEL}.cifar10-4ep'}
        header, body = card_of(tmp_path / 'out' / f'{ENCODER}.cifar10-4ep')
        assert header['datasets'] == ['uoft-cs/cifar10'] and 'randsac' in header['tags']
        assert 'CIFAR-10 as JPEG, 1,000 images; no labels' in body
        assert '| linear probe on cached features, 10 classes | 4,000 | 1,000 | 61.25 | 93.50 | 50.12 |' in body
        assert '| fine-tuning, 3 epochs, untrained encoder |  | 1,000 | 21.50 |  |  |' in body
        assert '- Not for cats.' in body
        assert 'commit 0123456789ab, torch 2.11.0, timm 1.0.23' in body
        assert 'A processor, avx2; 2 processes of 1 thread, float32' in body
        assert '| time | 5.0 minutes of training steps |' in body
        assert 'mean squared error of normalised pixels: 0.7500 in the first line of the log, 0.5000' in body
        assert 'somewhere' not in body + (tmp_path / 'out' / f'{ENCODER}.cifar10-4ep' / 'config.yaml').read_text()
        assert "create_model('local-dir:FOLDER', pretrained=True)" in body
        assert 'import autoreg_vit  # registers' in card_of(tmp_path / 'out' / f'{MODEL}.cifar10-4ep')[1]

    def test_a_card_keeps_every_score_of_detection_and_segmentation(self, run: Path, tmp_path: Path):
        names = product(('box', 'mask'), ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large'))
        measured = {f'{kind}_{name}': 10 + number / 4 for number, (kind, name) in enumerate(names)}
        paths = []
        for name, result in (('detect', {'num_classes': 80, **measured}), ('segment', {'miou': 40.5})):
            paths.append(tmp_path / f'{name}.json')
            paths[-1].write_text(json.dumps({**result, 'test_images': 7}))
        assert export(run, tmp_path / 'out', '--results', *paths) == 0
        body = card_of(tmp_path / 'out' / f'{ENCODER}.cifar10-4ep')[1]
        assert '| mIoU | box AP | box AP50 | box AP75 | box AP small |' in body
        numbers = ' | '.join(f'{value:.2f}' for value in measured.values())
        assert f'| detection, 80 classes |  | 7 |  | {numbers} |' in body
        assert '| segmentation |  | 7 | 40.50 |' in body

    def test_a_tag_in_a_runs_settings_is_no_provenance(self, run: Path, tmp_path: Path):
        """Runs of before it was refused began from random weights like any other."""
        settings = (run / 'config.yaml').read_text()
        (run / 'config.yaml').write_text(settings.replace(f'model: {MODEL}', f'model: {MODEL}.cifar10_10ep'))
        assert export(run, tmp_path / 'out', '--tag', 'a') == 0
        for name in (ENCODER, MODEL):
            texts = [(tmp_path / 'out' / f'{name}.a' / file).read_text() for file in ('README.md', 'config.yaml')]
            assert 'cifar10_10ep' not in ''.join(texts) and f'`{MODEL}`' in texts[0]

    def test_a_folder_says_how_the_runs_images_were_prepared(self, run: Path, tmp_path: Path):
        for part in ('encoder', 'pretrain'):
            content = json.loads((run / part / 'config.json').read_text())
            content['pretrained_cfg'].update(crop_pct=0.8, interpolation='bilinear')
            (run / part / 'config.json').write_text(json.dumps(content))
        assert export(run, tmp_path / 'out', '--tag', 'a') == 0
        for name in (ENCODER, MODEL):
            cfg = json.loads((tmp_path / 'out' / f'{name}.a' / 'config.json').read_text())['pretrained_cfg']
            assert (cfg['mean'], cfg['std'], cfg['input_size']) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [3, 32, 32])
            assert (cfg['crop_pct'], cfg['interpolation']) == (0.8, 'bilinear') and not cfg.keys() & {'license', 'tag'}

    def test_a_card_names_all_that_a_resumed_run_was_trained_with(self, tmp_path: Path):
        resumed = {**LINES[0], 'event': 'resume', 'commit': 'ba9876543210', 'hardware': 'Another, amx_bf16'}
        write_run(tmp_path / 'run', [*LINES[:3], resumed, resumed, *LINES[3:]])
        assert export(tmp_path / 'run', tmp_path / 'out') == 0
        body = card_of(tmp_path / 'out' / f'{ENCODER}.run')[1]
        assert 'commit 0123456789ab and ba9876543210, torch 2.11.0, timm 1.0.23' in body
        assert 'A processor, avx2 and Another, amx_bf16; 2 processes of 1 thread, float32' in body

    def test_the_command_of_the_card_is_that_of_the_run(self):
        config = PretrainConfig(model=MODEL, epochs=3, segments=(7, 3), hflip=0.0, norm_pix=False, compile=True,
                                data_dir='/somewhere', output_dir='/somewhere/else')
        assert command(config, 1) == ('autoreg-vit pretrain --segments 7 3 --no-norm-pix --data-dir FOLDER --hflip 0.0 '
                                      '--epochs 3 --compile')
        assert command(config, 2).startswith('torchrun --nproc-per-node 2 -m autoreg_vit pretrain --segments')

    def test_hours_are_those_of_steps(self):
        assert training_hours(LINES) == pytest.approx((2000 / 10 + 2000 / 20) / 3600)

    def test_encoder_alone(self, run: Path, tmp_path: Path):
        assert export(run, tmp_path / 'out', '--no-pretrain', '--tag', 'a') == 0
        assert [p.name for p in (tmp_path / 'out').iterdir()] == [f'{ENCODER}.a']

    def test_again_replaces_what_it_wrote_and_nothing_else(
            self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert export(run, tmp_path / 'out', '--tag', 'a', '--no-half') == 0
        assert export(run, tmp_path / 'out', '--tag', 'a', '--half') == 0
        assert load_file(tmp_path / 'out' / f'{ENCODER}.a' / 'model.safetensors')['norm.weight'].dtype == torch.float16
        assert len(list((tmp_path / 'out').iterdir())) == 2

        other = tmp_path / 'out' / f'{ENCODER}.b'
        other.mkdir()
        (other / 'mine.txt').write_text('mine')
        assert export(run, tmp_path / 'out', '--tag', 'b') == 2
        assert 'is no folder of exported weights' in capsys.readouterr().err and (other / 'mine.txt').exists()


    @pytest.mark.parametrize(('losses', 'sentence'), [
        ([1.0, 0.5, 0.9, 0.505, 0.4], 'was from 0.5000 (epoch 2, step 20) to 0.9000 (epoch 3, step 30); it was within '
                                      '1 % of the former again at epoch 4, step 40.'),
        ([1.0, 0.5, 0.7, 0.8, 0.6], 'was from 0.5000 (epoch 2, step 20) to 0.8000 (epoch 4, step 40); it did not come '
                                    'back to within 1 % of the former.'),
        ([1.0, 0.5, 0.505, 0.45, 0.4], None)])
    def test_a_card_says_where_the_loss_rose(self, tmp_path: Path, losses: list[float], sentence: str | None):
        steps = [{**LINES[2], 'step': 10 * n, 'epoch': float(n), 'images': 1000 * n, 'loss': loss}
                 for n, loss in enumerate(losses, 1)]
        write_run(tmp_path / 'run', [*LINES[:2], *steps, *LINES[4:]], epochs=5)
        assert export(tmp_path / 'run', tmp_path / 'out', '--no-pretrain') == 0
        body = card_of(tmp_path / 'out' / f'{ENCODER}.run')[1]
        assert sentence in body if sentence else 'greatest rise' not in body

    def test_needs_neither_the_encoder_nor_a_checkpoint_of_a_finished_run(self, run: Path, tmp_path: Path):
        """Both are in pretrain/: the card has the sum that the encoder's file would have."""
        encoder = sha256_of(run / 'encoder' / 'model.safetensors')
        shutil.rmtree(run / 'encoder')
        assert not (run / 'last.pt').exists()
        assert export(run, tmp_path / 'out', '--tag', 'a', '--half') == 0
        assert f'As float32 the file has the SHA-256 `{encoder}`.' in card_of(tmp_path / 'out' / f'{ENCODER}.a')[1]
        whole = sha256_of(run / 'pretrain' / 'model.safetensors')
        assert f'As float32 the file has the SHA-256 `{whole}`.' in card_of(tmp_path / 'out' / f'{MODEL}.a')[1]


class TestHalf:
    def dtypes(self, root: Path) -> list[torch.dtype]:
        files = [root / f'{name}.a' / 'model.safetensors' for name in (ENCODER, MODEL)]
        return [next(iter(load_file(file).values())).dtype for file in files]

    @pytest.mark.parametrize(('flag', 'dtype'), [('--half', torch.float16), ('--no-half', torch.float32)])
    def test_asked_for(self, run: Path, tmp_path: Path, flag: str, dtype: torch.dtype):
        assert export(run, tmp_path / 'out', '--tag', 'a', flag) == 0
        assert self.dtypes(tmp_path / 'out') == [dtype] * 2
        body = card_of(tmp_path / 'out' / f'{MODEL}.a')[1]
        assert ('stored as float16' in body) == (dtype == torch.float16)

    def test_by_default_where_it_loses_nothing(self, run: Path, tmp_path: Path):
        assert export(run, tmp_path / 'out', '--tag', 'a') == 0
        assert self.dtypes(tmp_path / 'out') == [torch.float16] * 2
        percent = float(re.search(r'by ([\d.e-]+) % \(root', card_of(tmp_path / 'out' / f'{ENCODER}.a')[1])[1])
        assert 0 < percent < 100 * exporting.HALF_LIMIT

    def test_not_where_weights_are_too_large(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        model = write_run(tmp_path / 'run')
        with torch.no_grad():  # cancels, but for float16, which ends at 65504
            model.encoder.blocks[0].mlp.fc2.bias.fill_(1e5)
            model.encoder.blocks[1].mlp.fc2.bias.fill_(-1e5)
        exporting.export_pretraining(model, tmp_path / 'run' / 'pretrain')
        assert export(tmp_path / 'run', tmp_path / 'out', '--tag', 'a') == 0
        assert self.dtypes(tmp_path / 'out') == [torch.float32] * 2
        assert 'Weights are float32, as trained.' in card_of(tmp_path / 'out' / f'{ENCODER}.a')[1]
        assert export(tmp_path / 'run', tmp_path / 'out', '--tag', 'a', '--half') == 2
        assert 'are not finite when stored as torch.float16' in capsys.readouterr().err


class TestUnfinished:
    def test_takes_the_checkpoint_and_the_log_up_to_it(self, tmp_path: Path):
        model = write_run(tmp_path / 'run', LINES[:4])  # as far as step 80 of 160
        (tmp_path / 'run' / 'config.yaml').write_text(
            (tmp_path / 'run' / 'config.yaml').read_text().replace('epochs: 4', 'epochs: 8', 1))
        with torch.no_grad():
            model.head.bias += 1
        save_checkpoint({'step': 40, 'model': model.state_dict()}, tmp_path / 'run' / 'last.pt')
        assert export(tmp_path / 'run', tmp_path / 'out', '--tag', 'a', '--no-half') == 0

        folder = tmp_path / 'out' / f'{MODEL}.a'
        assert torch.equal(load_file(folder / 'model.safetensors')['head.bias'], model.head.bias)
        assert [line['event'] for line in log_of(folder)] == ['start', 'evaluation', 'step']
        assert '2 of 8 epochs (the run is not finished), 2,000 images seen' in card_of(folder)[1]

    def test_without_a_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        write_run(tmp_path / 'run', LINES[:3])
        assert export(tmp_path / 'run', tmp_path / 'out') == 2
        assert 'is not finished and has no last.pt' in capsys.readouterr().err


class TestErrors:
    """One line each, and nothing written."""

    @pytest.mark.parametrize(('arguments', 'message'), [
        (['{tmp}/nothing', '{tmp}/out'], r'nothing holds no pretraining run with weights: expected config\.yaml and'),
        (['{run}', '{tmp}/out', '--tag', 'a.b'], r"A tag is letters, digits, - and _, .* got 'a\.b'"),
        (['{run}', '{tmp}/out', '--results', '{tmp}/none.json'], r'Cannot read the results .*none\.json'),
        (['{run}', '{tmp}/out', '--results', '{run}/pretrain/config.json'], r'config\.json holds no results: expected'),
        (['{run}'], 'required: FOLDER'),
        (['{run}', '{tmp}/out', 'more'], "Unknown argument 'more'"),
        (['{run}', '{tmp}/out', '--push', 'a/b'], "Did you mean '--push-to-hub'"),
        (['{run}', '{run}/config.yaml'], r'Cannot write .*config\.yaml'),
    ])
    def test_of_use(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str):
        assert export(*(a.format(run=run, tmp=tmp_path) for a in arguments)) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count('\n') == 1
        assert not (tmp_path / 'out').exists()

    @pytest.mark.parametrize('damage', ['cut', 'sum', 'config', 'log'])
    def test_of_damaged_runs(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str):
        weights = run / 'pretrain' / 'model.safetensors'
        if damage == 'cut':
            weights.write_bytes(weights.read_bytes()[:500])
        elif damage == 'sum':
            (run / 'pretrain' / 'model.safetensors.sha256').write_text(f'{"0" * 64}  model.safetensors\n')
        elif damage == 'config':
            (run / 'pretrain' / 'config.json').write_text('{')
        else:
            (run / 'log.jsonl').write_text('')
        assert export(run, tmp_path / 'out') == 2
        error = capsys.readouterr().err
        assert str(run) in error and error.count('\n') == 1
        assert not (tmp_path / 'out').exists()


class Server:
    """A Hub that answers every request alike."""

    def __init__(self, status: int):
        requests = self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers['Content-Length']))
                requests.append((self.path, json.loads(body)))
                self.send_response(status)
                self.send_header('Content-Length', '0')
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = HTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class TestHub:
    @pytest.mark.parametrize(('flags', 'private'), [([], True), (['--private'], True), (['--no-private'], False)])
    def test_uploads_both_folders(
            self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], private: bool):
        calls = []

        class Api:
            def create_repo(self, name: str, private: bool, exist_ok: bool):
                assert exist_ok and not (tmp_path / 'out').exists()  # before any work
                calls.append(('create', name, private))

            def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str):
                files = {path.name for path in Path(folder_path).iterdir()}
                assert {'config.json', 'model.safetensors', 'README.md'} <= files
                calls.append(('upload', repo_id, Path(folder_path).name))

        monkeypatch.setattr(exporting, 'HfApi', Api)
        assert export(run, tmp_path / 'out', '--tag', 'a', '--push-to-hub', 'me/model', *flags) == 0
        assert calls == [('create', 'me/model', private), ('create', 'me/model-pretrain', private),
                         ('upload', 'me/model', f'{ENCODER}.a'), ('upload', 'me/model-pretrain', f'{MODEL}.a')]
        body = card_of(tmp_path / 'out' / f'{ENCODER}.a')[1]
        assert "timm.create_model('hf-hub:me/model', pretrained=True)" in body

    @pytest.mark.parametrize(('status', 'remedy'), [
        (401, 'Log in with a token that may write: hf auth login, or set HF_TOKEN.'),
        (403, 'This token may not write there: name a repository of your own'), (500, 'Try again later.')])
    def test_refusals(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                      status: int, remedy: str):
        """By the library itself, against a server on this machine."""
        server, real = Server(status), exporting.HfApi
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
        monkeypatch.setattr(exporting, 'HfApi', lambda: real(endpoint=server.url, token='hf_none'))
        assert export(run, tmp_path / 'out', '--push-to-hub', 'me/model') == 2
        error = capsys.readouterr().err
        assert "Cannot upload to 'me/model' on the Hugging Face Hub" in error and remedy in error
        assert error.count('\n') == 1 and not (tmp_path / 'out').exists()
        path, body = server.requests[0]
        assert path == '/api/repos/create' and body['name'] == 'model' and body['organization'] == 'me'

    def test_offline(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert export(run, tmp_path / 'out', '--push-to-hub', 'me/model') == 2
        assert 'The Hub cannot be reached: unset HF_HUB_OFFLINE' in capsys.readouterr().err

    def test_name_that_is_none(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert export(run, tmp_path / 'out', '--push-to-hub', 'me/a/model') == 2
        assert 'Expected OWNER/NAME.' in capsys.readouterr().err
