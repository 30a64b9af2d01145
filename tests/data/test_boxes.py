"""Images with boxes and masks in COCO's format, their augmentation, and damage that is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoreg_vit.data.batches import Batches
from autoreg_vit.data.boxes import LargeScaleJitter, collate, open_data
from autoreg_vit.data.labelled import some_of
from autoreg_vit.engine.processes import Processes
from autoreg_vit.errors import DataError
from autoreg_vit.evaluation.box_scores import encode_masks
from tests.support.coco import runs_of, write_annotations, write_coco
from tests.support.detecting import config_for, everything, images_of
from tests.support.pictures import write_turned

CPU = Processes(torch.device('cpu'))


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
