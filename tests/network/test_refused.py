"""Networks that are not explained: one of each class, without memory for its weights."""

import pytest
import timm
import torch
import transformers
from torch import nn

import gmarpp
from gmarpp.network.families.refused import REFUSED

# Some are parts of networks.
OF_TIMM = {
    "BatNonLocalAttn": "bat_resnext26ts",
    "CSATv2": "csatv2",
    "CoaT": "coat_tiny",
    "CrossVit": "crossvit_tiny_240",
    "EdgeNeXt": "edgenext_xx_small",
    "EfficientFormerV2": "efficientformerv2_s0",
    "EfficientViM": "efficientvim_m1",
    "EfficientVit": "efficientvit_b0",
    "EfficientVitLarge": "efficientvit_l1",
    "EfficientVitMsra": "efficientvit_m0",
    "FocalNet": "focalnet_tiny_srf",
    "MambaOut": "mambaout_femto",
    "MobileNetV5": "mobilenetv5_300m",
    "MobileVitBlock": "mobilevit_xxs",
    "MobileVitV2Block": "mobilevitv2_050",
    "SelfAttnBlock": "lambda_resnet26t",
    "Sequencer2d": "sequencer2d_s",
    "SwiftFormer": "swiftformer_xs",
    "TNT": "tnt_s_legacy_patch16_224",
}


def network(kind):
    with torch.device("meta"):
        if kind in OF_TIMM:
            return timm.create_model(OF_TIMM[kind])
        name = getattr(transformers, kind)
        return name(name.config_class())


@pytest.mark.parametrize("kind", REFUSED)
def test_every_class_that_is_not_explained_has_a_message_of_its_own(kind):
    model = network(kind)
    assert kind in {type(module).__name__ for module in model.modules()}
    for each in (model, nn.Sequential(model)):
        with pytest.raises(gmarpp.UnsupportedNetworkError, match=f"^{kind} {REFUSED[kind][:30]}.*Explain a Vision"):
            gmarpp.architecture_of(each)


def test_networks_of_no_such_class_are_told_what_is_missing():
    with torch.device("meta"):
        model = timm.create_model("resnet10t")
    with pytest.raises(gmarpp.UnsupportedNetworkError, match="ResNet is not known to attend"):
        gmarpp.architecture_of(model)
