"""`autoreg-vit detect`: Mask R-CNN on a ViT, images in COCO's format, and average precision."""

import contextlib
import functools
import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

pytest.importorskip('faster_coco_eval')
pytest.importorskip('torchmetrics')

from coco import CATEGORIES, runs_of, write_annotations, write_coco
from launching import flags, launch_together
from pictures import write_turned
from supervising import log_of, results_of, stop_after

from autoreg_vit.commands.cli import main
from autoreg_vit.commands.detecting import _detect, detect
from autoreg_vit.commands.recipes import load_recipe
from autoreg_vit.data.batches import Batches
from autoreg_vit.data.boxes import CocoImages, LargeScaleJitter, Part, collate, open_data
from autoreg_vit.data.labelled import some_of
from autoreg_vit.engine.loop import create_optimizer, scaled_lr
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.signals import Stopped
from autoreg_vit.errors import CheckpointError, ConfigError, DataError, ModelError, ShapeError
from autoreg_vit.evaluation.box_scores import KINDS, SCORES, coco_results, encode_masks, evaluate, summary
from autoreg_vit.evaluation.metrics import METRICS
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.models.dense.detector import Canvas, ViTMaskRCNN, load_detector
from autoreg_vit.models.dense.windowed import WindowedAttention, use_windows
from autoreg_vit.settings.base import make_config
from autoreg_vit.settings.detecting import DetectConfig

CPU = Processes(torch.device('cpu'))
READING = dict(precision='float32', workers=0, group=CPU)
SMALL = {'embed_dim': 32, 'depth': 8, 'num_heads': 2, 'num_classes': 0, 'dynamic_img_size': True}


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> Path:
    """A folder with 8 images to train on and 5 to test."""
    root = tmp_path_factory.mktemp('coco')
    write_coco(root, 'train2017', 8)
    write_coco(root, 'val2017', 5, seed=1)
    return root


def images_of(root: Path, split: str) -> CocoImages:
    return CocoImages(root / split, root / 'annotations' / f'instances_{split}.json')


def everything(data: CocoImages, transform=None) -> Part:
    return Part(data, np.arange(len(data)), transform)


class TestWindows:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(0, 2))
    def test_tokens_see_their_window_alone(self, rows: int, columns: int, window: int, prefix: int):
        """Against attention to each window by itself, edges and prefix tokens included."""
        attention = timm.layers.Attention(8, num_heads=2)
        x = torch.randn(2, prefix + rows * columns, 8)
        out = WindowedAttention(attention, (rows, columns), window, prefix)(x)
        grid, expected, prefixes = x[:, prefix:].unflatten(1, (rows, columns)), torch.empty(2, rows, columns, 8), []
        for top in range(0, rows, window):
            for left in range(0, columns, window):
                part = grid[:, top:top + window, left:left + window]
                seen = attention(torch.cat([x[:, :prefix], part.flatten(1, 2)], dim=1))
                prefixes.append(seen[:, :prefix])
                expected[:, top:top + window, left:left + window] = seen[:, prefix:].view_as(part)
        expected = torch.cat([torch.stack(prefixes).mean(0), expected.flatten(1, 2)], dim=1)
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_tiny_randsac'])
    def test_a_window_as_large_as_the_image_is_global_attention(self, name: str):
        """With and without a class token; padding is not seen, since there is none."""
        encoder = timm.create_model(name, **{**SMALL, 'img_size': (96, 80), 'drop_path_rate': 0.5}).eval()
        image = torch.randn(2, 3, 96, 80)
        expected = encoder.forward_features(image)
        use_windows(encoder, 6, global_blocks=(1,))
        assert [isinstance(block.attn, WindowedAttention) for block in encoder.blocks] == [True, False, *[True] * 6]
        torch.testing.assert_close(encoder.forward_features(image), expected)
        for block in encoder.blocks[2:]:
            block.attn.window = 2
        assert not torch.allclose(encoder.forward_features(image), expected)

    def test_what_windows_do_not_fit(self):
        encoder = timm.create_model('vit_tiny_patch16_224', **SMALL)
        encoder.blocks[2].attn = nn.Identity()
        with pytest.raises(ModelError, match=r'Block 2 .* no plain timm Attention'):
            use_windows(encoder, 6, (0,))
        with pytest.raises(ModelError, match='takes no mask'):
            encoder.blocks[1].attn(torch.randn(1, 3, 32), attn_mask=torch.ones(3, 3))


def small_detector(size: tuple[int, int] = (64, 64), **options) -> nn.Module:
    encoder = timm.create_model('vit_tiny_randsac', **SMALL)
    return ViTMaskRCNN(encoder, 2, size, **{
        'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'window': 2, 'width': 16, 'rois': 16, 'norm': 'layer',
        'anchor_sizes': (8, 16, 32, 64, 128), **options})


class TestDetector:
    def test_the_published_setting(self):
        """Global attention at the end of each quarter of ViT-B, windows of 14 elsewhere, a synchronised batch norm."""
        with torch.device('meta'):
            encoder = timm.create_model('vit_base_patch16_224', num_classes=0, dynamic_img_size=True)
        encoder.to_empty(device='cpu')
        model = ViTMaskRCNN(encoder, 80, (1024, 1024), mean=(0.5,) * 3, std=(0.25,) * 3)
        windowed = [isinstance(block.attn, WindowedAttention) for block in encoder.blocks]
        assert [i for i, w in enumerate(windowed) if not w] == [2, 5, 8, 11]
        assert encoder.blocks[0].attn.window == 14 and encoder.blocks[0].attn.grid == (64, 64)
        assert encoder.pos_embed.shape == (1, 64 * 64 + 1, 768)
        kinds = [type(module).__name__ for module in model.roi_heads.box_head.modules()]
        assert kinds.count('Conv2d') == kinds.count('BatchNorm2d') == 4 and kinds.count('Linear') == 1
        assert [type(m).__name__ for m in model.rpn.head.conv.modules()].count('Conv2d') == 2
        assert [type(m).__name__ for m in model.roi_heads.mask_head.modules()].count('BatchNorm2d') == 4
        assert [type(m).__name__ for m in model.backbone.fpn.modules()].count('BatchNorm2d') == 8

    @pytest.mark.parametrize('norm', ['batch', 'layer'])
    @pytest.mark.parametrize('attention', ['windowed', 'global'])
    def test_trains(self, norm: str, attention: str):
        """On images of two sizes, one without objects; also where no image of the batch has any."""
        model = small_detector((64, 96), norm=norm, attention=attention)
        images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
        nothing = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64),
                   'masks': torch.zeros(0, 64, 64, dtype=torch.uint8)}
        targets = [{'boxes': torch.tensor([[8.0, 8.0, 40.0, 48.0]]), 'labels': torch.tensor([1]),
                    'masks': torch.ones(1, 60, 90, dtype=torch.uint8)}, nothing]
        sum(model(images, targets).values()).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        model.zero_grad()
        sum(model(images[1:], targets[1:]).values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert all(torch.isfinite(b).all() for b in model.buffers())

    def test_coordinates_stay_float32_in_bfloat16(self):
        """Anchors, proposals and boxes: bfloat16 would hold those of a large image to several pixels."""
        model = small_detector((32, 608)).eval()
        model.roi_heads.score_thresh = 0.0
        proposals = []
        model.rpn.register_forward_hook(lambda module, inputs, output: proposals.append(output[0][0]))
        with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
            boxes = model([torch.rand(3, 32, 608)])[0]['boxes']
        for found in (proposals[0], boxes):
            assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
        assert model.rpn.anchor_generator.cell_anchors[0].dtype == torch.float32

    def test_the_canvas(self):
        """In evaluation images fit in at their aspect, upper left; in training they come as they are."""
        canvas = Canvas((64, 96), (0.5,) * 3, (0.5,) * 3).eval()
        batch, _ = canvas([torch.ones(3, 100, 50), torch.ones(3, 10, 30)])
        assert batch.tensors.shape == (2, 3, 64, 96) and batch.image_sizes == [(64, 32), (32, 96)]
        assert torch.allclose(batch.tensors[0, :, :, :32], torch.ones(())) and not batch.tensors[0, :, :, 32:].any()
        batch, _ = canvas.train()([torch.ones(3, 20, 30)], None)
        assert batch.image_sizes == [(20, 30)] and batch.tensors.sum() == 3 * 20 * 30
        with pytest.raises(ShapeError, match='65 x 10 pixels does not fit'):
            canvas([torch.ones(3, 65, 10)])

    @pytest.mark.parametrize('options, error, words', [
        ({'size': (64, 100)}, ShapeError, '64 x 100'), ({'attention': 'local'}, ModelError, "got 'local'"),
        ({'norm': 'group'}, ModelError, "got 'group'"), ({'anchor_sizes': (8, 16)}, ModelError, 'five numbers')])
    def test_what_does_not_fit(self, options: dict, error: type, words: str):
        with pytest.raises(error, match=words):
            small_detector(**options)


def config_for(root: Path, **settings) -> DetectConfig:
    return DetectConfig(**{'weights': 'vit_tiny_randsac', 'data_dir': str(root), 'eval_split': 'val2017',
                           'precision': 'float32', 'workers': 0, **settings})


class TestData:
    def test_items(self, coco: Path):
        content = json.loads((coco / 'annotations' / 'instances_train2017.json').read_text())
        data = images_of(coco, 'train2017')
        assert len(data) == 8 and data.categories == {3: 'box', 7: 'disc'}
        seen = 0
        for index, image in enumerate(content['images']):
            pixels, target = data[index]
            annotations = [a for a in content['annotations'] if a['image_id'] == image['id']]
            assert pixels.shape == (3, image['height'], image['width']) and pixels.dtype == torch.uint8
            assert target['labels'].tolist() == [{3: 1, 7: 2}[a['category_id']] for a in annotations]
            for annotation, mask, box in zip(annotations, target['masks'], target['boxes']):
                left, top, width, height = annotation['bbox']
                assert box.tolist() == [left, top, left + width, top + height]
                assert mask.sum() == annotation['area'] and mask[:, :left].sum() == mask[top + height:].sum() == 0
                seen += 1
        assert seen == len(content['annotations']) > 8
        assert not len(target['boxes']) and target['masks'].shape == (0, 48, 64), 'the last image has no object'
        assert sum(images_of(coco, 'train2017')[i][1]['iscrowd'].sum() for i in range(8)) > 0

    def test_splits(self, coco: Path, tmp_path: Path):
        """Images without objects are left out of training, not of evaluation; a fifth is held out without a split."""
        train, test = open_data(config_for(coco), 3, CPU)
        assert (len(train), len(test)) == (7, 5)
        train, test = open_data(config_for(coco, eval_split=None), 3, CPU)
        assert len(test) == 2 and len(train) in (5, 6) and not set(train.samples) & set(test.samples)
        train, test = open_data(config_for(coco, train_images=3, test_images=2), 3, CPU)
        assert (len(train), len(test)) == (3, 2)
        content = write_coco(tmp_path, 'train2017', 3)
        for annotation in content['annotations']:
            annotation['iscrowd'] = 1
        write_annotations(tmp_path, 'train2017', content)
        with pytest.raises(DataError, match="No image of the split 'train2017' has an object"):
            open_data(config_for(tmp_path, eval_split='train2017'), 3, CPU)

    def test_no_object_to_report_on_is_said(self, coco: Path, capsys):
        """The last image has none."""
        config = config_for(coco, test_images=1)
        config.seed = next(seed for seed in range(99) if some_of(np.arange(5), 1, seed) == [4])
        open_data(config, 3, CPU)
        assert 'Of 1 images to report on none has an object' in capsys.readouterr().out

    def test_other_categories(self, coco: Path, tmp_path: Path):
        write_coco(tmp_path, 'train2017', 2)
        content = write_coco(tmp_path, 'val2017', 2)
        content['categories'][0]['name'] = 'ball'
        other = write_annotations(tmp_path, 'other', content)
        with pytest.raises(DataError, match=r"'train2017' and 'val2017' .*\(7, 'ball'\), \(7, 'disc'\) are in one"):
            open_data(config_for(tmp_path, eval_annotations=str(other)), 3, CPU)

    def test_unreadable_images_and_other_sizes(self, tmp_path: Path):
        write_coco(tmp_path, 'train2017', 6)
        write_coco(tmp_path, 'val2017', 3)
        Image.new('RGB', (9, 9)).save(tmp_path / 'train2017' / '103.png')
        (tmp_path / 'train2017' / '106.png').write_bytes(b'no image')
        with pytest.raises(DataError, match=r'2 of 5 images .*103.png has 9 x 9 pixels, .*106.png'):
            open_data(config_for(tmp_path), 3, CPU)
        train, test = open_data(config_for(tmp_path, max_corrupt=0.4), 3, CPU)
        batches = iter(Batches(train, 5, 0, CPU, max_corrupt=0.4, collate=collate).start_at(0))
        assert len(next(batches)[0]) == 5, 'others stand in for them'
        (tmp_path / 'val2017' / '103.png').write_bytes(b'no image')
        with pytest.raises(DataError, match=r'Cannot read .*val2017/103.png'):
            test[1]

    def test_one_image_cannot_be_trained_and_reported_on(self, tmp_path: Path):
        write_coco(tmp_path, 'train2017', 2)
        content = json.loads((tmp_path / 'annotations' / 'instances_train2017.json').read_text())
        identity = content['images'].pop()['id']
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] != identity]
        write_annotations(tmp_path, 'train2017', content)
        with pytest.raises(DataError, match=r'Of 1 training image none can be held out.*name --eval-split'):
            open_data(config_for(tmp_path, eval_split=None), 3, CPU)
        write_coco(tmp_path, 'val2017', 2)  # as advised
        assert [len(part) for part in open_data(config_for(tmp_path), 3, CPU)] == [1, 2]

    def test_images_are_upright_and_of_any_depth(self, tmp_path: Path):
        content = write_coco(tmp_path, 'train2017', 3)
        first, second = (tmp_path / 'train2017' / image['file_name'] for image in content['images'][:2])
        upright = Image.open(first).convert('RGB')
        write_turned(first, upright, 6)
        deep = np.asarray(Image.open(second).convert('L')).astype(np.uint16) * 257
        Image.fromarray(deep).save(second)
        found = images_of(tmp_path, 'train2017')
        assert np.array_equal(found[0][0].permute(1, 2, 0), np.asarray(upright))
        assert np.array_equal(found[1][0][0], deep // 257)
        write_turned(first, upright.transpose(Image.Transpose.ROTATE_90), 6)
        with pytest.raises(DataError, match='its EXIF orientation turns it'):
            found[0]

    def test_compressed_run_lengths(self, coco: Path, tmp_path: Path):
        content = write_coco(tmp_path, 'train2017', 4)
        data = images_of(tmp_path, 'train2017')
        codes = {i: encode_masks(data[i][1]['masks']) for i in range(4)}
        for i, image in enumerate(content['images']):
            for annotation, code in zip([a for a in content['annotations'] if a['image_id'] == image['id']], codes[i]):
                annotation['segmentation'] = code
        write_annotations(tmp_path, 'train2017', content)
        again = images_of(tmp_path, 'train2017')
        assert all(torch.equal(again[i][1]['masks'], data[i][1]['masks']) for i in range(4))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 6), st.integers(0, 10 ** 6), st.sampled_from([(32, 32), (64, 96), (20, 100)]))
    def test_large_scale_jitter(self, coco: Path, index: int, seed: int, size: tuple[int, int]):
        """Images fit the canvas; boxes are tight around masks; image and masks move together; crowds are gone."""
        image, target = images_of(coco, 'train2017')[index]
        # A picture of what is annotated: each object's mask in its own grey, seen as the image.
        painted = torch.zeros(3, *image.shape[1:], dtype=torch.uint8)
        for mask in target['masks'][target['iscrowd'] == 0]:
            painted[:, mask > 0] = 255
        torch.manual_seed(seed)
        jittered, new = LargeScaleJitter(size, (0.1, 2.0), 0.5)(painted, target)
        assert all(s <= most for s, most in zip(jittered.shape[1:], size)) and jittered.dtype == torch.uint8
        assert len(new['boxes']) == len(new['labels']) == len(new['masks']) <= int((target['iscrowd'] == 0).sum())
        for box, mask in zip(new['boxes'], new['masks']):
            y, x = mask.nonzero().unbind(1)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        union = new['masks'].any(0)
        if min(jittered.shape[1:]) >= 24:
            assert ((jittered[0] > 127) != union.bool()).float().mean() < 0.12, 'masks went elsewhere than the image'

    def test_jitter_repeats(self, coco: Path):
        data = everything(images_of(coco, 'train2017'), LargeScaleJitter((64, 64), (0.1, 2.0), 0.5))
        first, second = (torch.manual_seed(3) and data[1] for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1]['boxes'], second[1]['boxes'])
        assert first[0].shape != data[1][0].shape or not torch.equal(first[0], data[1][0])

    def test_without_jitter_images_fit_the_canvas(self, coco: Path):
        image, target = LargeScaleJitter((96, 96), (1.0, 1.0), 0.0)(*images_of(coco, 'train2017')[1])
        assert image.shape == (3, 72, 96) and len(target['boxes'])

    @pytest.mark.parametrize('change, words', [
        (lambda c: c['annotations'][0].update(image_id=5), ['Annotation 1 of', 'the image 5']),
        (lambda c: c['annotations'][1].update(category_id=1), ['Annotation 2 of', 'the category 1']),
        (lambda c: c['annotations'][0].update(image_id=[100]), ['Annotation 1 of', 'the image [100]']),
        (lambda c: c['annotations'][0].update(category_id={}), ['Annotation 1 of', 'the category {}']),
        (lambda c: c['annotations'][0].update(bbox=[1, 2, -3, 4]), ['Annotation 1', '[1, 2, -3, 4]', 'width']),
        (lambda c: c['annotations'][0].update(bbox=[1, 2, 3]), ['Annotation 1', '[1, 2, 3]']),
        (lambda c: c['annotations'][0].update(bbox=[1, 2, float('nan'), 4]), ['Annotation 1', 'nan']),
        (lambda c: c['annotations'][0].pop('segmentation'), ['Annotation 1', 'no mask']),
        (lambda c: c['annotations'][0].update(segmentation=[[1, 2, 3, 4]]), ['Annotation 1', 'polygon']),
        (lambda c: c['annotations'][0].update(segmentation=[[1e9, 2, 3, 4, 5, 6]]), ['Annotation 1', 'polygon']),
        (lambda c: c['annotations'][0].update(segmentation=[]), ['Annotation 1', 'polygon']),
        (lambda c: c['annotations'][0].update(segmentation={'size': [9, 9], 'counts': [81]}), ['Annotation 1', '9']),
        (lambda c: c['annotations'][0].update(segmentation={'size': [64, 48], 'counts': 'P13700'}), ['1', 'be read']),
        (lambda c: c['annotations'][0].update(segmentation={'size': 5, 'counts': 'P1'}), ['Annotation 1', '5 pixels']),
        (lambda c: c['annotations'][0].update(segmentation={'size': [64, 48], 'counts': None}), ['1', 'be read']),
        (lambda c: c['annotations'][0].update(iscrowd=2), ['Annotation 1', 'iscrowd 2']),
        (lambda c: c['annotations'][0].update(area=-1), ['Annotation 1', 'area -1']),
        (lambda c: c['images'][1].update(file_name='gone.png'), ['1 of the 4 images', 'gone.png', 'missing']),
        (lambda c: c['images'][1].update(id=100), ['image 100', 'same']),
        (lambda c: c['images'][1].pop('height'), ['image 103', 'height']),
        (lambda c: c['categories'][1].update(id=7), ['category', 'box']),
        (lambda c: c.update(images=[]), ['lists no images']),
        (lambda c: c.pop('categories'), ['"categories"']),
    ])
    def test_damaged_annotations(self, change, words: list[str], tmp_path: Path):
        content = write_coco(tmp_path, 'train2017', 4)
        change(content)
        if not content.get('images'):
            content['annotations'] = []
        write_annotations(tmp_path, 'train2017', content)
        with pytest.raises(DataError) as error:
            images_of(tmp_path, 'train2017')
        assert all(word in str(error.value) for word in [*words, 'instances_train2017.json']), error.value

    def test_damaged_files(self, tmp_path: Path):
        write_coco(tmp_path, 'train2017', 4)
        path = tmp_path / 'annotations' / 'instances_train2017.json'
        for text, words in (('{"images": [', 'no JSON file, or damaged'), ('[]', 'not in COCO'), ('{}', '"images"')):
            path.write_text(text)
            with pytest.raises(DataError, match=words):
                images_of(tmp_path, 'train2017')
        path.unlink()
        with pytest.raises(DataError, match=r'No annotations .*instances_train2017.json'):
            images_of(tmp_path, 'train2017')

    def test_boxes_of_no_width(self, tmp_path: Path):
        """Kept as annotated for evaluation; training goes by the mask."""
        content = write_coco(tmp_path, 'train2017', 2, crowds=False)
        for annotation in content['annotations'][:1]:
            annotation['bbox'] = [1, 2, 0, 0]
        height, width = (content['images'][0][side] for side in ('height', 'width'))
        content['annotations'].append({'id': 99, 'image_id': 100, 'category_id': 3, 'bbox': [1, 1, 0, 5],
                                       'segmentation': runs_of(np.zeros((height, width), bool))})
        write_annotations(tmp_path, 'train2017', content)
        image, target = images_of(tmp_path, 'train2017')[0]
        _, new = LargeScaleJitter((64, 64), (1.0, 1.0), 0.0)(image, target)
        assert target['boxes'][0].tolist() == [1, 2, 1, 2] and len(new['boxes']) == len(target['boxes']) - 1
        assert torch.all(new['boxes'][:, 2:] > new['boxes'][:, :2])


class Guesses(nn.Module):
    """Stands for a detector: what is annotated, shifted, some of it missed, some twice, some of another class."""

    def __init__(self, data: CocoImages, seed: int = 0):
        super().__init__()
        self.data, self.seed, self.at = data, seed, 0

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.at += len(images)
        return [self.guess(index) for index in range(self.at - len(images), self.at)]

    def guess(self, index: int) -> dict[str, torch.Tensor]:
        _, target = self.data[index]
        draw = torch.Generator().manual_seed(1000 * self.seed + index)
        keep = torch.rand(len(target['labels']), generator=draw) < 0.8
        chosen = keep.nonzero().flatten().tolist() * 2
        shift = torch.randint(-4, 5, (len(chosen), 2), generator=draw)
        masks = [target['masks'][i].roll(tuple(s), (0, 1)) for i, s in zip(chosen, shift.tolist())]
        masks = torch.stack(masks) if masks else target['masks'][:0]
        labels = target['labels'][chosen]
        odd = torch.rand(len(chosen), generator=draw) < 0.2
        return {'boxes': target['boxes'][chosen].float() + shift.flip(1).repeat(1, 2), 'masks': masks[:, None].float(),
                'labels': torch.where(odd, 3 - labels, labels),
                'scores': torch.rand(len(chosen), generator=draw).round(decimals=2)}


def pycocotools_scores(file: Path, results: list[dict], images: list[int]) -> dict[str, float]:
    """COCO's own evaluation of the same results against the file that the data came from; -100 for nothing to find."""
    coco_api = pytest.importorskip('pycocotools.coco', reason='compares with pycocotools')
    from pycocotools.cocoeval import COCOeval

    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_api.COCO(str(file))
        for kind, iou_type in KINDS.items():
            # With boxes, it would take the size of masks from them.
            found = truth.loadRes([{k: v for k, v in r.items() if kind == 'box' or k != 'bbox'} for r in results])
            evaluation = COCOeval(truth, found, iou_type)
            evaluation.params.imgIds = images
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores |= {f'{kind}_{name}': 100 * value for name, value in zip(SCORES, evaluation.stats[:6].tolist())}
    return scores


class TestEvaluation:
    @pytest.mark.parametrize('seed', [0, 1, 2])
    def test_equals_pycocotools(self, seed: int, tmp_path: Path):
        """On the same predictions, with crowds, images without objects, ties of scores and ids with gaps."""
        write_coco(tmp_path, 'val2017', 12, seed=seed, size=(150, 200))
        data = everything(images_of(tmp_path, 'val2017'))
        result = evaluate(Guesses(data.dataset, seed), data, data.dataset.categories, **READING)
        results = json.loads(json.dumps(coco_results(result['detections'], data)))
        expected = pycocotools_scores(tmp_path / 'annotations' / 'instances_val2017.json', results, data.dataset.ids)
        assert 5 < result['box_ap'] < 95 and result['images'] == 12
        for name, value in expected.items():
            assert result.get(name, -100) == pytest.approx(value, abs=1e-4), name
        assert set(result['per_class']) == {c['name'] for c in CATEGORIES}

    def test_two_categories_of_one_name(self):
        scores = {f'{p}_{k}': torch.tensor(0.5) for p in KINDS.values() for k in SCORES.values()}
        scores.update({'classes': torch.tensor([1, 2]), 'bbox_map_per_class': torch.tensor([0.2, 0.9]),
                       'segm_map_per_class': torch.tensor([0.1, -1.0])})
        assert {name: {k: round(v) for k, v in found.items()} for name, found in summary(
            scores, {3: 'dog', 7: 'dog'})['per_class'].items()} == {
                'dog': {'box_ap': 20, 'mask_ap': 10}, 'dog (2)': {'box_ap': 90}}

    def test_nothing_found(self, coco: Path):
        data = everything(images_of(coco, 'val2017'))
        model = small_detector().eval()
        model.roi_heads.score_thresh = 2.0
        result = evaluate(model, data, data.dataset.categories, **READING)
        assert result['box_ap'] == result['mask_ap'] == 0 and 'box_ap_large' not in result
        assert all(not len(found['boxes']) for found in result['detections']) and len(result['detections']) == 5
        assert coco_results(result['detections'], data) == []

    def test_what_is_annotated_is_perfect(self, coco: Path):
        class Oracle(Guesses):
            def guess(self, index: int) -> dict[str, torch.Tensor]:
                target = self.data[index][1]
                keep = target['iscrowd'] == 0
                return {**{k: target[k][keep] for k in ('boxes', 'labels')}, 'scores': torch.ones(int(keep.sum())),
                        'masks': target['masks'][keep][:, None].float()}

        data = everything(images_of(coco, 'val2017'))
        result = evaluate(Oracle(data.dataset), data, data.dataset.categories, **READING)
        assert result['box_ap'] == pytest.approx(100) and result['mask_ap'] == pytest.approx(100)


#: Mask R-CNN in small: a second for a few steps.
SHORT = {'img_size': (64,), 'width': 16, 'rois': 16, 'norm': 'layer', 'window': 3, 'anchor_sizes': (8, 12, 20, 32, 64),
         'batch_size': 2, 'log_every': 2, 'checkpoint_every_minutes': 0.0, 'warmup_steps': 1, 'drop_path_rate': 0.2,
         'precision': 'float32'}


@pytest.fixture(scope='module')
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('weights') / 'encoder'
    options = {'patch_size': 8, 'embed_dim': 32, 'depth': 8, 'num_heads': 2}
    export_encoder(timm.create_model('vit_tiny_patch4_32_randsac', **options), folder, mean=[0.5] * 3, std=[0.25] * 3)
    return str(folder)


@pytest.fixture(scope='module')
def run(encoder: str, coco: Path, tmp_path_factory) -> Path:
    """By the command line, reporting on the images that it is trained on."""
    folder = tmp_path_factory.mktemp('run') / 'detect'
    settings = {**SHORT, 'command': 'detect', 'dataset': None, 'weights': encoder, 'data_dir': coco, 'steps': 50,
                'eval_split': 'train2017', 'batch_size': 4, 'lr': 1e-2, 'jitter': (0.9, 1.1), 'warmup_steps': 5,
                'eval_every': 40, 'drop_path_rate': 0.0, 'save_detections': True, 'output_dir': folder}
    assert main(flags(settings)) == 0
    return folder


def start_from(folder: Path) -> None:
    """Have every detector of this process begin with the weights in `folder`."""
    build = ViTMaskRCNN.__init__

    def build_and_load(self, *args, **options) -> None:
        build(self, *args, **options)
        self.load_state_dict(load_file(folder / 'model.safetensors'))

    ViTMaskRCNN.__init__ = build_and_load


class TestRun:
    def test_learns(self, run: Path):
        """Seven images, which it is then asked about; the eighth has nothing on it."""
        results, log = results_of(run), log_of(run)
        losses = [line['loss'] for line in log if line['event'] == 'step']
        assert losses[-1] < 0.6 * losses[0] and results['box_ap50'] > 10 and results['mask_ap50'] > 10
        assert (results['train_images'], results['test_images'], results['num_classes']) == (7, 8, 2)
        assert set(results['per_class']) == {'box', 'disc'} and results['eval_split'] == 'train2017'
        evaluations = [line for line in log if line['event'] == 'evaluation']
        assert [line['images'] for line in evaluations] == [160, 200]
        scores = {f'{kind}_{name}' for kind in KINDS for name in SCORES}
        measured = scores & results.keys()  # all its objects are small
        assert scores <= METRICS.keys() and {'box_ap', 'box_ap75', 'mask_ap_small'} <= measured
        assert all(evaluations[-1][name] == results[name] for name in measured) and log[-1]['event'] == 'finish'
        assert all((run / 'figures' / name).stat().st_size > 10_000 for name in ('detections.png', 'learning.png'))

    def test_detections_score_the_same_in_pycocotools(self, run: Path, coco: Path):
        """From the files that are left and those that the data came from."""
        file, results = coco / 'annotations' / 'instances_train2017.json', results_of(run)
        images = [image['id'] for image in json.loads(file.read_text())['images']]
        for name, value in pycocotools_scores(file, json.loads((run / 'detections.json').read_text()), images).items():
            assert results.get(name, -100) == pytest.approx(value, abs=1e-3), name

    def test_the_model_loads_again(self, run: Path, coco: Path, tmp_path: Path):
        model = load_detector(run / 'model')
        assert [c['name'] for c in model.config['categories']] == ['box', 'disc'] and not model.training
        assert isinstance(model.backbone.pyramid.encoder.blocks[0].attn, WindowedAttention)
        data = everything(images_of(coco, 'train2017'))
        again = evaluate(model, data, data.dataset.categories, **READING)
        assert again['box_ap'] == pytest.approx(results_of(run)['box_ap'], abs=1e-3)
        with torch.no_grad():
            assert model([torch.rand(3, 130, 70)])[0]['masks'].shape[1:] == (1, 130, 70)
        broken = tmp_path / 'model'
        shutil.copytree(run / 'model', broken)
        (broken / 'model.safetensors').write_bytes((run / 'model' / 'model.safetensors').read_bytes()[:-9])
        with pytest.raises(CheckpointError, match='does not match its checksum'):
            load_detector(broken)
        shutil.copytree(run / 'model', broken, dirs_exist_ok=True)
        (broken / 'config.json').write_text('{}')
        with pytest.raises(CheckpointError, match=r"no whole detector \(KeyError: 'options'\)"):
            load_detector(broken)
        with pytest.raises(CheckpointError, match=r'nowhere holds no whole detector .* autoreg-vit detect'):
            load_detector('nowhere')

    def test_a_finished_run_is_left_alone(self, run: Path, capsys):
        before = (run / 'last.pt').stat().st_mtime_ns
        assert main(['detect', '--config', str(run / 'config.yaml')]) == 0
        assert 'is finished' in capsys.readouterr().out and (run / 'last.pt').stat().st_mtime_ns == before
        assert main(['detect', '--config', str(run / 'config.yaml'), '--steps', '20', '--force-resume']) == 2
        assert 'has taken 50 steps, and with these settings it ends after 20' in capsys.readouterr().err

    def test_resumes_exactly(self, encoder: str, coco: Path, tmp_path: Path, monkeypatch):
        """With jitter, flips, drawn regions, stochastic depth, accumulation, and recomputed blocks."""
        settings = {**SHORT, 'weights': encoder, 'data_dir': str(coco), 'eval_split': 'val2017', 'steps': 4,
                    'accumulate': 2, 'in_chans': 1, 'lr': 1e-2, 'grad_checkpointing': True, 'norm': 'batch',
                    'attention': 'global'}
        whole = detect(DetectConfig(**settings, output_dir=str(tmp_path / 'whole')))
        config = DetectConfig(**settings, output_dir=str(tmp_path / 'parts'))
        with monkeypatch.context() as patch:
            stop_after(2, patch)
            with pytest.raises(Stopped, match='after step 2 of 4'):
                detect(config)
        parts = detect(config)
        weights = [(folder / 'model' / 'model.safetensors').read_bytes() for folder in (whole, parts)]
        assert weights[0] == weights[1] and results_of(whole) == results_of(parts)
        assert 'detections.json' not in {path.name for path in parts.iterdir()}
        assert len(load_detector(parts / 'model')([torch.rand(1, 50, 40)])) == 1

    def test_two_processes(self, run: Path, encoder: str, coco: Path, tmp_path: Path):
        """They take a step of nothing with a trained model, share out five test images, and score as one process."""
        settings = {**SHORT, 'command': 'detect', 'dataset': None, 'weights': encoder, 'data_dir': coco, 'steps': 1,
                    'eval_split': 'val2017', 'lr': 0.0, 'output_dir': tmp_path / 'two'}
        launches = launch_together(settings, 2, functools.partial(start_from, run / 'model'))
        assert [launch.wait() for launch in launches] == [0, 0], launches[0].text() + launches[1].text()
        results, data = results_of(tmp_path / 'two'), everything(images_of(coco, 'val2017'))
        one = evaluate(load_detector(run / 'model'), data, data.dataset.categories, **READING)
        assert results['test_images'] == one['images'] == 5 and one['box_ap50'] > 5
        for name in ('box_ap', 'mask_ap', 'box_ap50', 'mask_ap50', 'box_ap_small'):
            assert results[name] == pytest.approx(one[name], abs=1e-3)
        with pytest.raises(ConfigError, match=r'norm=batch .* --norm layer'):
            _detect(config_for(coco, weights=encoder), Processes(torch.device('cpu'), rank=0, world_size=2))

    def test_layer_decay(self):
        """Blocks learn at a part of the rate of the block above, and all that is new at the full rate."""
        model = small_detector()
        optimizer = create_optimizer(config_for(Path(), layer_decay=0.7), model, layer_decay=0.7)
        names, groups = {id(p): name for name, p in model.named_parameters()}, {}
        for group in optimizer.param_groups:
            groups |= {names[id(p)]: group for p in group['params']}
        encoder = 'backbone.pyramid.encoder.'
        scale = {name: group['lr_scale'] for name, group in groups.items()}
        assert scale[f'{encoder}blocks.7.mlp.fc1.weight'] == pytest.approx(0.7)
        assert scale[f'{encoder}blocks.0.attn.attention.qkv.weight'] == pytest.approx(0.7 ** 8)
        assert scale[f'{encoder}pos_embed'] == scale[f'{encoder}patch_embed.proj.weight'] == pytest.approx(0.7 ** 9)
        assert scale['rpn.head.cls_logits.weight'] == scale['backbone.fpn.inner_blocks.0.0.weight'] == 1
        assert groups[f'{encoder}pos_embed']['weight_decay'] == 0 < groups['rpn.head.cls_logits.weight']['weight_decay']


@pytest.mark.parametrize('arguments, words', [
    (['--data-dir', 'COCO'], ['--weights']),
    (['--weights', 'ENCODER'], ['--data-dir']),
    (['--weights', 'ENCODER', '--data-dir', 'missing'], ['No folder missing/train2017']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--train-split', 'train2014'], ['train2014', '--train-split']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--train-annotations', 'no.json'], ['No annotations no.json']),
    (['--weights', 'resnet18', '--no-pretrained', '--data-dir', 'COCO'], ['resnet18']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--attention', 'local'], ["got 'local'"]),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--norm', 'group'], ["got 'group'"]),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--img-size', '100'], ['100 x 100', '32']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--img-size', '1', '2', '3'], ['img_size', '(1, 2, 3)']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--jitter', '2', '1'], ['jitter', '(2.0, 1.0)']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--anchor-sizes', '8'], ['anchor_sizes', '(8,)']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--window', '0'], ['window', '0']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--batch-size', '64'], ['5 training images', '--batch-size 5']),
    (['--weights', 'ENCODER', '--data-dir', 'COCO', '--schedule', 'step'], ['schedule', 'step']),
])
def test_errors_are_one_line_before_any_work(arguments, words, encoder: str, coco: Path, tmp_path: Path, monkeypatch,
                                             capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [{'ENCODER': encoder, 'COCO': str(coco)}.get(a, a) for a in arguments]
    defaults = [] if '--batch-size' in arguments else ['--batch-size', '2']
    assert main(['detect', *arguments, *defaults]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert not list(tmp_path.iterdir())


def test_without_its_packages(coco: Path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: None if name == 'torchmetrics' else find(name))
    assert main(['detect', '--weights', 'vit_tiny_randsac', '--data-dir', str(coco)]) == 2
    assert 'detect needs torchmetrics: pip install "autoreg-vit[dense]"' in capsys.readouterr().err


def test_the_papers_setting():
    recipe = make_config(DetectConfig, load_recipe('maskrcnn_coco', 'detect'), {'weights': 'x', 'data_dir': 'y'})
    assert recipe == DetectConfig(weights='x', data_dir='y', eval_split='val2017'), 'the defaults are the setting'
    assert scaled_lr(recipe, recipe.lr) == pytest.approx(8e-5) and recipe.batch_size == 64
    assert recipe.steps == 100 * (117266 // 64) and recipe.canvas == (1024, 1024)
    mini = make_config(DetectConfig, load_recipe('maskrcnn_coco_mini', 'detect'), {'weights': 'x', 'data_dir': 'y'})
    encoder = timm.create_model('vit_tiny_patch16_224', num_classes=0, dynamic_img_size=True)
    ViTMaskRCNN(encoder, 80, mean=(0.5,) * 3, std=(0.5,) * 3, **mini.detector_options())
