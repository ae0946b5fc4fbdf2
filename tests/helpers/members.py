"""Members of a team who run commands, each with a home of their own."""

import torch
from safetensors.torch import load_file

from kdcache.cache import Cache
from kdcache.cache.home import caches_folder, teachers_folder
from kdcache.tests.helpers.registries import run

BUILD = "build --teacher resnet8 --views 1"


def works(line):
    result = run(line)
    assert result.exit_code == 0, result.output
    return result


def told(line, *words):
    """Exit status 2; the last line says `words`."""
    result = run(line)
    last = result.output.strip().splitlines()[-1]
    assert result.exit_code == 2 and all(word in last for word in words), result.output
    return last


def only():
    """The only cache under KDCACHE_HOME."""
    (path,) = caches_folder().iterdir()
    return Cache(path)


def another(by=1.0):
    """Other weights for the same network in a file, as fine-tuning gives them."""
    (taught,) = teachers_folder().glob("digits-*/resnet8.safetensors")
    state = load_file(taught)
    state["fc.bias"] = state["fc.bias"] + by
    torch.save(state, f"other{by}.pt")
    return f"other{by}.pt"


def published(root):
    """The only cache of a registry and its teacher's hash, once they were pushed from here."""
    works(f"push {only().key} --registry {root}")
    return only().key, only().identity.teacher.weights
