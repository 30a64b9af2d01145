"""What storing weights as float16 changes: features and loss of a run's own weights and of the exported ones.

    python -m benchmarks.half_precision --data-dir FOLDER --pairs RUN/pretrain=weights/MODEL.TAG ...

Takes the first training images of a drawn order, without augmentation, and computes in float32 on a CPU. Features are
the encoder's own, their difference is the root mean square relative to that of the run's; the loss is that of equal
drawn orders of prediction.
"""

import argparse
import json

import timm
import torch
from torch.utils.data import DataLoader, Subset

import autoreg_vit  # noqa: F401  registers the models
from autoreg_vit.data.labelled import labelled_images
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.processes import Processes
from autoreg_vit.evaluation.features import features_of
from autoreg_vit.settings.classification import ProbeConfig

from .report import RESULTS, provenance


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--data-name', default='CIFAR-10', help='as results should call the images')
    parser.add_argument('--pairs', nargs='+', required=True, metavar='RUN=EXPORTED', help='folders of whole models')
    parser.add_argument('--images', type=int, default=512)
    parser.add_argument('--output', default=str(RESULTS / 'half_precision.json'))
    args = parser.parse_args()
    rows = []
    for pair in args.pairs:
        folders = pair.split('=')
        models = [timm.create_model(f'local-dir:{folder}', pretrained=True).eval() for folder in folders]
        config = ProbeConfig(weights=folders[0], dataset='folder', data_dir=args.data_dir, check_images=0)
        images = labelled_images(config, ImageSpec.of(models[0]), Processes(torch.device('cpu'))).plain
        draw = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:args.images].tolist()
        features, losses = ([], []), torch.zeros(2)
        for batch, _ in DataLoader(Subset(images, draw), 64):
            ranks = None
            for number, model in enumerate(models):
                output = model(batch, ranks)
                ranks = output.ranks
                losses[number] += output.loss * len(batch) / args.images
                features[number].append(features_of(model.encoder, batch))
        trained, stored = map(torch.cat, features)
        rows.append({
            'model': folders[1].rstrip('/').rpartition('/')[2], 'images': args.images,
            'features_relative': f'{(stored - trained).norm() / trained.norm():.1e}',
            'loss_float32': round(losses[0].item(), 6), 'loss_float16': round(losses[1].item(), 6),
            'loss_difference': f'{losses[1] - losses[0]:.1e}'})
        print(rows[-1], flush=True)
    content = {**provenance(), 'data': args.data_name, 'rows': rows}
    with open(args.output, 'w', encoding='utf-8') as file:
        file.write(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    main()
