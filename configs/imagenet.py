"""The networks of the paper on ImageNet, with its recipe: one command per row of tables 1 to 4.

Command:   python train.py --config=configs/imagenet.py:lip_resnet50 --workdir=runs/lip_resnet50
           The argument is a model (`lip-jax models` lists them) or a row of the table below. With
           ",tiny" behind it, as in configs/imagenet.py:table1_average,tiny, everything is shrunk to
           a few steps on small images of the embedded data set, to see that a row runs at all.
Data:      imagenet2012 as TFDS or `lip-jax data prepare` make it (docs/data.md);
           --config.data.data_dir=DIR if it is not in ~/tensorflow_datasets. To try a machine
           without it: --config.data.dataset=fake
Hardware:  not yet run here; docs/tpu.md has the batch for each TPU and what it would take
Expected:  the paper's top-1 and top-5 in percent, one crop of 224 px; "-" where the figure could
           not be obtained (lip_jax/tools/paper.py has the sources). `lip-jax tables` adds ours.

  argument                  top-1  top-5  our result
  table1_strided            76.40  93.15  not yet run
  table1_average                -      -  not yet run
  table1_max                    -      -  not yet run
  table1_dpp_full_sym           -      -  not yet run
  table1_dpp_full_asym          -      -  not yet run
  table1_dpp_lite_sym           -      -  not yet run
  table1_dpp_lite_asym          -      -  not yet run
  table1_dpp_original           -      -  not yet run
  table1_lip_projection         -      -  not yet run
  table1_lip_bottleneck64       -      -  not yet run
  table1_lip_bottleneck128  78.19  93.96  not yet run
  table1_lip_bottleneck256  78.15      -  not yet run
  table2_a                  78.19  93.96  not yet run
  table2_b                      -      -  not yet run
  table2_c                      -      -  not yet run
  table2_d                      -      -  not yet run
  table3_a                      -      -  not yet run
  table3_b                      -      -  not yet run
  table3_c                      -      -  not yet run
  table3_d                      -      -  not yet run
  table3_e                  78.19  93.96  not yet run
  table4_resnet50           76.40  93.15  not yet run
  table4_lip_resnet50       78.19  93.96  not yet run
  table4_resnet101          77.98  93.98  not yet run
  table4_lip_resnet101      79.33  94.60  not yet run
  table4_densenet121        75.62  92.56  not yet run
  table4_lip_densenet121    76.64  93.16  not yet run

Recipe (authors' training script and section 4.1): SGD with a learning rate of 0.1 for 256 images,
divided by 10 after 30, 60 and 80 of 90 epochs; no warm-up, no label smoothing; batch norm over 32
images (64 for DenseNets). Any value can be set, such as --config.dtype=bfloat16 or
--config.model.lip_stages="('c4', 'c5')".
"""

from typing import Any

from ml_collections import ConfigDict

from lip_jax import list_models
from lip_jax.errors import UsageError
from lip_jax.tools import paper


def get_config(arg: str = "lip_resnet50") -> ConfigDict:
  """Configuration of a model or row.

  Args:
    arg: one of `lip_jax.list_models()` or a name of `lip_jax.tools.paper.ROWS`; and ",tiny".

  Raises:
    UsageError: anything else, with what there is.
  """
  name, _, size = arg.partition(",")
  if size not in ("", "tiny"):
    raise UsageError(f"unknown size {size!r} in {arg!r}; leave it out, or write {name},tiny")
  model, options = _network(name)

  config = ConfigDict()
  config.model = ConfigDict({"name": model, **options})
  if "densenet" in model:
    config.model.bn_group_size = 64
  else:
    config.model.bn_group_size = 32
    config.model.zero_init_residual = True
  config.data = ConfigDict({"dataset": paper.DATASET})
  if size:
    _shrink(config)
  return config


def _network(name: str) -> tuple[str, dict[str, Any]]:
  """Name of the model and its options."""
  if name in list_models():
    return name, {}
  for row in paper.ROWS:
    if row.name == name:
      return row.model, dict(row.options)
  rows = ", ".join(row.name for row in paper.ROWS)
  raise UsageError(
    f"unknown network {name!r}; choose one of the models {', '.join(list_models())} or of the "
    f"paper's rows {rows}; with ,tiny behind it for a trial"
  )


def _shrink(config: ConfigDict) -> None:
  """What is left is the kind of network: four steps of it in seconds."""
  config.num_epochs = 0.5
  config.global_batch_size = 8
  config.eval_batch_size = 8

  config.model.width = 8
  config.model.logit_width = 4
  if "average_steps" in config.model:
    config.model.average_steps = 1
  config.model.bn_group_size = 4
  if "densenet" in config.model.name:
    config.model.block_sizes = (1, 1, 1, 1)
    config.model.growth = 4
  else:
    config.model.stage_sizes = (1, 1, 1, 1)

  config.data.dataset = "cluttered_digits/classify"
  config.data.train_split = "train[:64]"
  config.data.validation_split = "validation[:16]"
  config.data.image_size = 32
  config.data.eval_resize = 36
  config.data.num_threads = 2

  config.log_every_steps = 1
  config.eval_every_epochs = 0.5
  config.checkpoint_every_steps = 4
