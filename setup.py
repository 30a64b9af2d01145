"""Packaging of autoreg-vit. The version lives in autoreg_vit/version.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r"__version__ = '(.+)'", (here / 'autoreg_vit' / 'version.py').read_text())[1]

train = ['matplotlib>=3.8', 'pyyaml>=6.0', 'scikit-learn>=1.4', 'tqdm>=4.66']
dense = [*train, 'faster-coco-eval>=1.8', 'segmentation-models-pytorch>=0.6', 'torchmetrics>=1.5']
dev = [*dense, 'datasets>=4', 'pytest>=8', 'pytest-xdist>=3.6', 'hypothesis>=6.100', 'mypy>=1.18', 'pre-commit>=4',
       'pycocotools>=2.0.8', 'ruff>=0.12', 'setuptools>=77', 'transformers>=4.49', 'types-PyYAML', 'types-tqdm',
       'webdataset>=0.2']
# The trained weights lie beside the package in a clone, and inside it where it is installed.
weights = ['autoreg_vit.weights'] if (here / 'weights').is_dir() else []

setup(
    name='autoreg-vit',
    version=version,
    description='Autoregressive self-supervised pretraining of Vision Transformers for timm: RandSAC, SAIM and between',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=['autoregressive', 'computer vision', 'image', 'pretraining', 'PyTorch', 'RandSAC', 'SAIM',
              'self-supervised learning', 'timm', 'vision transformer'],
    license_expression='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.10',
    packages=[*find_packages(include=['autoreg_vit', 'autoreg_vit.*']), *weights],
    package_dir={'autoreg_vit.weights': 'weights'},
    package_data={
        'autoreg_vit': ['py.typed'],
        'autoreg_vit.weights': ['*/*'],
        'autoreg_vit.ops.triton': ['launches.json'],
        'autoreg_vit.commands': ['recipes/*.yaml', 'recipes/*/*.yaml'],
    },
    install_requires=[
        'torch>=2.11',
        'torchvision',
        'timm>=1.0.26',
        'safetensors',
        'huggingface-hub',
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={'train': train, 'dense': dense, 'dev': dev},
    entry_points={'console_scripts': ['autoreg-vit = autoreg_vit.commands.cli:main']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
