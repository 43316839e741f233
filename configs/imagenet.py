"""The networks of the paper on ImageNet, with its recipe: one command per row of tables 1 to 4.

Command:   python train.py --config=configs/imagenet.py:lip_resnet50 --workdir=runs/lip_resnet50
           The argument is a model (`lip-jax models` lists them) or a row of the table below. With
           ",tiny" behind it, as in configs/imagenet.py:table1_average,tiny, everything is shrunk to
           a few steps on small images of the embedded data set, to see that a row runs at all.
Data:      imagenet2012 as TFDS or `lip-jax data prepare` make it (docs/data.md);
           --config.data.data_dir=DIR if it is not in ~/tensorflow_datasets. To try a machine
           without it: --config.data.dataset=fake
Hardware:  not yet run here; docs/tpu.md has the batch for each TPU and what it would take
Expected:  the paper's top-1 and top-5 in percent, one crop of 224 px; "N/A": did not train in the
           paper either; "-": a further pooling, not the paper's. `lip-jax tables` adds ours.

  argument                  top-1  top-5  our result
  table1_strided            76.40  93.15  not yet run
  table1_average            76.96  93.35  not yet run
  table1_dpp                76.87  93.30  not yet run
  table1_dpp_original       77.22  93.64  not yet run
  table1_lip_projection     77.49  93.86  not yet run
  table1_lip_bottleneck64   77.92  93.97  not yet run
  table1_lip_bottleneck128  78.19  93.96  not yet run
  table1_lip_bottleneck256  78.15  94.02  not yet run
  table2_a                  78.19  93.96  not yet run
  table2_b                    N/A    N/A  not yet run
  table2_c                  77.81  93.86  not yet run
  table2_d                  77.89  93.86  not yet run
  table3_a                  78.19  93.96  not yet run
  table3_b                  77.87  93.94  not yet run
  table3_c                  77.78  93.81  not yet run
  table3_d                  76.92  93.37  not yet run
  table3_e                  76.40  93.15  not yet run
  table4_resnet50           76.40  93.15  not yet run
  table4_lip_resnet50       78.19  93.96  not yet run
  table4_resnet101          77.98  93.98  not yet run
  table4_lip_resnet101      79.33  94.60  not yet run
  table4_resnet152          78.49  94.22  not yet run
  table4_densenet121        75.62  92.56  not yet run
  table4_lip_densenet121    76.64  93.16  not yet run
  further_max                   -      -  not yet run
  further_dpp_lite_asym         -      -  not yet run
  further_dpp_full_sym          -      -  not yet run
  further_dpp_full_asym         -      -  not yet run
  further_soft                  -      -  not yet run
  further_lp                    -      -  not yet run
  further_exp                   -      -  not yet run

Recipe (section 4.1): that of Goyal et al. 2017 for 256 images, with the vanilla momentum instead of
Nesterov's, and a weight decay of 1e-4 on all parameters, those of batch norms included. Batch norm
over 32 images (64 for DenseNets), as on the paper's 8 (4) GPUs. As in the authors' training script,
the learning rate is 0.1, divided by 10 after 30, 60 and 80 of 90 epochs, without warm-up or label
smoothing. Any value can be set, such as --config.dtype=bfloat16 or
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
    arg: one of `lip_jax.list_models()` or a name of `lip_jax.tools.paper.NETWORKS`; and ",tiny".

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
  row = paper.NETWORKS.get(name)
  if row and row.model:
    return row.model, dict(row.options)
  raise UsageError(
    f"unknown network {name!r}; choose one of the models {', '.join(list_models())} or of the "
    f"paper's rows {', '.join(paper.NETWORKS)}; with ,tiny behind it for a trial"
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
