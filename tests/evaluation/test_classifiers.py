"""Accuracies of nearest neighbours and of a linear classifier on the features of an encoder."""

import numpy as np
import pytest
import timm
import torch

pytest.importorskip('sklearn')

from autoreg_vit.errors import DataError
from autoreg_vit.evaluation.classifiers import accuracies, knn_accuracy, linear_accuracy
from autoreg_vit.evaluation.features import Readable, extract_features


class TestAccuracies:
    def test_separable_features_are_found(self):
        generator = np.random.default_rng(0)
        labels = np.arange(300) % 3
        features = np.eye(3)[labels] + generator.normal(0, 0.1, (300, 3))
        train, test = (features[:200], labels[:200]), (features[200:], labels[200:])
        assert knn_accuracy(train, test) == linear_accuracy(train, test) == 100
        chance = (features[:200], generator.permutation(labels[:200]))
        assert knn_accuracy(chance, test) < 60

    def test_of_a_single_class_that_class_is_the_answer(self):
        train, test = (np.random.default_rng(0).normal(size=(4, 3)), np.full(4, 2)), (np.zeros((4, 3)), np.arange(4))
        assert linear_accuracy(train, test) == knn_accuracy(train, test) == 25

    def test_images_that_cannot_be_read_are_left_out(self, capsys):
        class Damaged(torch.utils.data.Dataset):
            def __len__(self):
                return 7

            def __getitem__(self, index: int):
                if index in self.damaged:
                    raise OSError('damaged')
                return torch.full((3, 32, 32), float(index % 2)), index % 2

        encoder = timm.create_model('vit_tiny_patch4_32_randsac', depth=1)
        train, test = Damaged(), Damaged()
        train.damaged, test.damaged = {0, 5}, {6}
        assert accuracies(encoder, train, test, torch.device('cpu')) == {'knn': 100, 'linear': 100}
        assert '3 of 14 images cannot be read, and are left out of the accuracies' in capsys.readouterr().out
        found = extract_features(encoder, Readable(train), torch.device('cpu'), batch_size=1)
        assert found[1].tolist() == [1, 0, 1, 0, 0]
        test.damaged = set(range(7))
        with pytest.raises(DataError, match=r'None of the 7 images .* can be read, of which image 0 is the first'):
            accuracies(encoder, train, test, torch.device('cpu'))

    def test_features_are_the_encoders(self):
        encoder = timm.create_model('vit_tiny_patch4_32_randsac', depth=1).train()
        images = torch.randn(5, 3, 32, 32)
        dataset = torch.utils.data.TensorDataset(images, torch.arange(5))
        features, labels = extract_features(encoder, dataset, torch.device('cpu'), batch_size=2)
        assert encoder.training and labels.tolist() == [0, 1, 2, 3, 4]
        torch.testing.assert_close(torch.from_numpy(features), encoder.eval()(images))

    def test_a_process_without_an_image_has_no_features(self):
        """Where processes share out fewer images than there are of them."""
        encoder = timm.create_model('vit_tiny_patch4_32_randsac', depth=1)
        features, labels = extract_features(encoder, torch.utils.data.Subset([], []), torch.device('cpu'))
        assert features.shape == (0, encoder.num_features) and labels.shape == (0,)
