"""The outside reference of `ablations.py`: a masked autoencoder (He et al. 2022) by transformers, trained on the same
batches with the same optimizer and schedule as every other row. Needs `pip install "transformers>=5.23"`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoreg_vit.commands.runs import begun
from autoreg_vit.data.pretraining import training_batches
from autoreg_vit.data.transforms import ImageSpec
from autoreg_vit.engine.objective import Evaluation, ForwardPass, Objective
from autoreg_vit.engine.processes import Processes
from autoreg_vit.engine.run import Run
from autoreg_vit.engine.seeding import mix_seed
from autoreg_vit.engine.trainer import Trainer
from autoreg_vit.errors import ConfigError
from autoreg_vit.hub.folders import export_encoder
from autoreg_vit.models import AutoregressiveViT, create_pretraining_model
from autoreg_vit.models.encoders import SinCosVisionTransformer, init_xavier, sincos_position_embedding
from autoreg_vit.settings.base import option
from autoreg_vit.settings.pretraining import PretrainConfig

_REMEDY = 'pip install "transformers>=5.23", or choose --rows without mae.'


@dataclass
class MaeConfig(PretrainConfig):
    """`model` and its options give the sizes of encoder and decoder: a RandSAC model's, whose decoder's depth, width
    and heads MAE has too (RandSAC 5)."""
    mask_ratio: float = option(0.75, 'part of the tokens that is masked')


def build_mae(sizes: AutoregressiveViT, mask_ratio: float = 0.75) -> nn.Module:
    """transformers' ViTMAEForPreTraining as large as a RandSAC model.

    Raises:
        ConfigError: where transformers is missing or too old.
    """
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise ConfigError(f'Rows of MAE need transformers: {_REMEDY}') from error
    encoder, decoder, embed = sizes.encoder, sizes.decoder, sizes.encoder.patch_embed
    model = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=encoder.embed_dim, num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.num_heads,
        intermediate_size=encoder.blocks[0].mlp.fc1.out_features,
        image_size=embed.img_size[0], patch_size=embed.patch_size[0], num_channels=embed.proj.in_channels,
        decoder_hidden_size=decoder.dim, decoder_num_hidden_layers=len(decoder.blocks),
        decoder_num_attention_heads=decoder.blocks[0].self_attn.num_heads,
        decoder_intermediate_size=decoder.blocks[0].mlp.fc1.out_features,
        layer_norm_eps=1e-6, mask_ratio=mask_ratio, norm_pix_loss=True))
    if not hasattr(model.vit, 'layers'):
        raise ConfigError(f'This version of transformers names the weights of MAE otherwise: {_REMEDY}')
    # As MAE and both papers initialise; transformers 5.23 leaves the decoder without positions.
    model.apply(init_xavier)
    with torch.no_grad():
        nn.init.xavier_uniform_(model.vit.embeddings.patch_embeddings.projection.weight.flatten(1))
        nn.init.normal_(model.decoder.mask_token, std=0.02)
        for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            positions.zero_()
            positions[0, 1:] = sincos_position_embedding(embed.grid_size, positions.shape[-1])
    return model


def to_timm(model: nn.Module, sizes: AutoregressiveViT) -> SinCosVisionTransformer:
    """The encoder of transformers' MAE as a timm VisionTransformer with a class token."""
    vit, weights = model.vit.state_dict(), {}
    names = {'layernorm_before': 'norm1', 'layernorm_after': 'norm2', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2',
             'attention.o_proj': 'attn.proj'}
    for kind in ('weight', 'bias'):
        weights[f'norm.{kind}'] = vit[f'layernorm.{kind}']
        weights[f'patch_embed.proj.{kind}'] = vit[f'embeddings.patch_embeddings.projection.{kind}']
        for block in range(len(sizes.encoder.blocks)):
            theirs, ours = f'layers.{block}', f'blocks.{block}'
            weights[f'{ours}.attn.qkv.{kind}'] = torch.cat(
                [vit[f'{theirs}.attention.{part}_proj.{kind}'] for part in 'qkv'])
            for name, target in names.items():
                weights[f'{ours}.{target}.{kind}'] = vit[f'{theirs}.{name}.{kind}']
    weights['cls_token'] = vit['embeddings.cls_token']
    weights['pos_embed'] = vit['embeddings.position_embeddings']
    encoder = SinCosVisionTransformer(**{
        **sizes.encoder.init_args, 'class_token': True, 'global_pool': 'avg', 'fc_norm': False})
    encoder.load_state_dict({name: value.cpu() for name, value in weights.items()})
    return encoder


def pretrain_mae(config: MaeConfig) -> Path:
    """Pretrain MAE, or resume its run: `autoreg_vit.commands.pretraining.pretrain` with another model. Leaves
    `encoder/`, a timm folder."""
    with begun(config) as (config, group):
        sizes = create_pretraining_model(config.model, **config.model_options())
        spec = ImageSpec.of(sizes)
        batches = training_batches(config, spec, group)
        objective = MaskedAutoencoding(config, build_mae(sizes, config.mask_ratio).to(group.device), sizes, spec, group)
        trainer = Trainer(config, objective, batches, group)
        with Run(config, 'mae', group, {'train_images': batches.sampler.length}) as run:
            if not run.finished:
                trainer.run(run)
                trainer.export(run.folder)
                run.finish()
            return run.folder


class MaskedAutoencoding(Objective):
    """Masked tokens predicted from those that are left (He et al. 2022).

    Args:
        config: Settings of the run.
        model: transformers' model, on the device.
        sizes: The model that gave its sizes.
        spec: Images that it takes.
        group: The processes.
    """

    def __init__(
            self,
            config: MaeConfig,
            model: nn.Module,
            sizes: AutoregressiveViT,
            spec: ImageSpec,
            group: Processes,
    ):
        super().__init__(model, f'MAE as large as {config.model}', {
            'parameters': sum(p.numel() for p in model.parameters()),
            'encoder_parameters': sum(p.numel() for p in model.vit.parameters())})
        self.config, self.sizes, self.spec, self.group = config, sizes, spec, group
        self.share, self.generators = group.share(config.batch_size), [torch.Generator(group.device)]

    def seed(self, step: int) -> None:
        self.generators[0].manual_seed(mix_seed(self.config.seed, 'ranks', step))

    def loss(self, network: nn.Module, batch: Any, part: ForwardPass) -> torch.Tensor:
        # What is masked is drawn for all processes, so that no sharing out of the images changes it.
        noise = torch.rand(self.config.batch_size, self.sizes.encoder.patch_embed.num_patches,
                           generator=self.generators[0], device=self.group.device)
        return network(batch[0], noise=noise[self.share]).loss

    def settle(self, network: nn.Module) -> torch.Tensor:
        return network(self.spec.nothing(self.share.stop - self.share.start, self.group.device)).loss

    def evaluate(self, model: nn.Module) -> Evaluation:
        """None: its encoder is probed when it is trained."""
        return Evaluation({})

    def export(self, model: nn.Module, folder: Path) -> None:
        export_encoder(to_timm(model, self.sizes), folder / 'encoder', mean=self.spec.mean, std=self.spec.std)
