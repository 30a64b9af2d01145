"""Models for torch.hub, from the clone that this file lies in:

    torch.hub.load('OWNER/autoreg-vit', 'vit_tiny_patch4_32_randsac', pretrained=True, trust_repo=True)
    torch.hub.load('path/to/clone', 'vit_tiny_patch4_32_randsac', pretrained=True, source='local')

Of the repository on GitHub, `torch.hub.list` names all entrypoints and `torch.hub.help` describes one.
"""

import inspect as _inspect

import timm as _timm

from autoreg_vit import models as _models  # registers them with timm

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub']


def _entrypoint(name: str):
    def create(pretrained: bool = False, **kwargs):
        return make(name, pretrained=pretrained, **kwargs)

    make = _models.create_pretraining_model if name in _models.pretraining_models() else _timm.create_model
    tags = [known.partition('.')[2] for known in _timm.list_models(f'{name}.*', pretrained=True)]
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{_inspect.getdoc(_timm.models.model_entrypoint(name))}

    Args:
        pretrained: Load trained weights. Tags: {', '.join(tags) or 'none'}.
        **kwargs: Arguments of timm.create_model: num_classes, img_size, in_chans, features_only, pretrained_cfg='TAG'
            for the weights of a tag, ...
    """
    return create


for _name in _timm.list_models():
    if _timm.models.model_entrypoint(_name).__module__.startswith('autoreg_vit.'):
        globals()[_name] = _entrypoint(_name)
