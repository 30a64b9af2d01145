"""Settings of the commands that write weights: `export` and `convert`."""

from dataclasses import dataclass

from .base import Settings, argument, option


@dataclass
class ExportConfig(Settings):
    """Settings of `autoreg-vit export`."""
    help_group = 'what is written'

    run: str = argument('folder of a pretraining run')
    folder: str = argument('folder to write FOLDER/ARCHITECTURE.TAG in, for the encoder and for the whole model')
    tag: str | None = option(None, 'name of data and schedule, cifar10_280ep; by default that of the run\'s folder')
    default_tag: bool = option(False, 'declare it the tag that the model\'s bare name means, among several in weights/')
    pretrain: bool = option(True, 'write the whole model, encoder and decoder, besides the encoder')
    half: bool | None = option(None, 'store float16; by default where it changes outputs by less than 0.5 %')
    results: tuple[str, ...] = option((), 'results.json of probing and fine-tuning runs, for the card')
    data: str | None = option(None, 'what the images are, for the card: "CIFAR-10 as JPEG of quality 75"')
    data_id: tuple[str, ...] = option((), 'their names on the Hugging Face Hub: uoft-cs/cifar10')
    hardware: str | None = option(None, 'what the run was trained on, for the card; by default from its log')
    commit: str | None = option(None, 'commit it was trained with, for the card; by default from its log')
    license: str | None = option(
        None, 'licence of the weights, as the Hub spells it: apache-2.0; by default none is stated')
    limits: str | None = option(None, 'what else the weights should not be used for, for the card')
    push_to_hub: str | None = option(
        None, 'upload to this repository on the Hugging Face Hub, OWNER/NAME; the whole model to OWNER/NAME-pretrain')
    private: bool = option(True, 'make a new repository a private one; --no-private, one that everyone can read')


@dataclass
class ConvertConfig(Settings):
    """Settings of `autoreg-vit convert`."""
    help_group = 'the checkpoint'

    source: str = argument('a published checkpoint of SAIM or MAE, pretrained or fine-tuned')
    folder: str = argument('folder to write FOLDER/encoder in, and for SAIM\'s pretraining FOLDER/pretrain')
    prefix: str = option('', 'what its tensors\' names begin with: backbone., or teacher. for an entry of the file')
    num_heads: int | None = option(
        None, 'heads of the encoder, which no tensor\'s shape shows; by default width / 64, for ViT-H 16')
