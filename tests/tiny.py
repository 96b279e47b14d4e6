"The small network and the random images that tests of training share."
import torch

from sedm_kit.networks import EDMPrecond, seeded


def small(seed=0, **settings):
    with seeded(seed):
        return EDMPrecond(8, 1, **{"model_type": "PatchNet", "sigma_data": 0.5, "channels": 8, "blocks": 1, **settings})


def images(n=64, seed=0):
    with seeded(seed):
        return torch.rand(n, 1, 8, 8) * 2 - 1
