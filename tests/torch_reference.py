"""LIP networks in PyTorch, as functions of a state_dict: what to compare ours with at any size.

Written from the paper and the names in the published weights; checked against the reference logits
of LIP-ResNet-50 and LIP-DenseNet-121 before it is used for networks that have none.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name


class Network:
  """Forward pass from weights under the authors' names, with running or batch statistics."""

  def __init__(self, state_dict, *, training=False):
    self.weights = {name: torch.as_tensor(value) for name, value in state_dict.items()}
    self.training = training

  def conv(self, x, name, stride=1):
    kernel = self.weights[f"{name}.weight"]
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2)

  def batch_norm(self, x, name):
    part = {key: self.weights[f"{name}.{key}"] for key in ("weight", "bias")}
    mean, var = (self.weights[f"{name}.running_{key}"].clone() for key in ("mean", "var"))
    return F.batch_norm(x, mean, var, **part, training=self.training)

  def instance_norm(self, x, name):
    return F.instance_norm(
      x, weight=self.weights[f"{name}.weight"], bias=self.weights[f"{name}.bias"]
    )

  def trunk(self, x, name):
    for index in (1, 2):
      x = F.relu(self.instance_norm(self.conv(x, f"{name}.conv{index}"), f"{name}.bn{index}"))
    return x

  def gated(self, x, conv, norm):
    return 12 * torch.sigmoid(self.instance_norm(self.conv(x, conv), norm))

  def lip(self, x, logits, window=3, stride=2, padding=1):
    importance = logits.exp()
    weighted = F.avg_pool2d(x * importance, window, stride, padding)
    return weighted / F.avg_pool2d(importance, window, stride, padding)

  def has(self, prefix):
    return any(name.startswith(prefix) for name in self.weights)


class ResNet(Network):
  """LIP-ResNet or plain ResNet, of bottleneck or basic blocks."""

  def __call__(self, images):
    x = F.relu(self.batch_norm(self.conv(images, "conv1", 2), "bn1"))
    if self.has("maxpool."):
      x = self.lip(x, self.gated(x, "maxpool.logit.conv", "maxpool.logit.bn"))
    else:
      x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
      block = 0
      while self.has(f"layer{stage}.{block}."):
        x = self.block(x, f"layer{stage}.{block}")
        block += 1
    return F.linear(x.mean((2, 3)), self.weights["fc.weight"], self.weights["fc.bias"])

  def block(self, x, name):
    halves = not name.startswith("layer1.") and name.endswith(".0")
    bottleneck = self.has(f"{name}.conv3.")
    h = F.relu(self.batch_norm(self.conv(x, f"{name}.conv1"), f"{name}.bn1")) if bottleneck else x
    spatial, norm = ("conv2", "bn2") if bottleneck else ("conv1", "bn1")
    shortcut, stride = x, 1
    if self.has(f"{name}.bottleneck_shared."):
      shared = self.trunk(x, f"{name}.bottleneck_shared.logit")
      head = f"{name}.{spatial}.0.postprocessing"
      h = self.lip(h, self.gated(shared, f"{head}.conv", f"{head}.bn"))
      h = self.conv(h, f"{name}.{spatial}.1")
      head = f"{name}.downsample.lip.postprocessing"
      shortcut = self.lip(x, self.gated(shared, f"{head}.conv", f"{head}.bn"))
    else:
      stride = 2 if halves else 1
      h = self.conv(h, f"{name}.{spatial}", stride)
    h = F.relu(self.batch_norm(h, f"{name}.{norm}"))
    last, norm = ("conv3", "bn3") if bottleneck else ("conv2", "bn2")
    h = self.batch_norm(self.conv(h, f"{name}.{last}"), f"{name}.{norm}")
    if self.has(f"{name}.downsample."):
      conv, norm = ("0", "1") if self.has(f"{name}.downsample.0.") else ("conv", "bn")
      shortcut = self.conv(shortcut, f"{name}.downsample.{conv}", stride)
      shortcut = self.batch_norm(shortcut, f"{name}.downsample.{norm}")
    return F.relu(h + shortcut)


class DenseNet(Network):
  """LIP-DenseNet-BC or plain DenseNet-BC."""

  def __call__(self, images):
    x = self.conv(images, "features.conv0", 2)
    x = F.relu(self.batch_norm(x, "features.norm0"))
    plain = not self.has("features.pool0.")
    if plain:
      x = F.max_pool2d(x, 3, 2, 1)
    else:
      logit = "features.pool0.logit"
      x = self.lip(x, self.gated(x, f"{logit}.conv1", f"{logit}.bn1"))
    for index in (1, 2, 3, 4):
      layer = 1
      while self.has(f"features.denseblock{index}.denselayer{layer}."):
        name = f"features.denseblock{index}.denselayer{layer}"
        h = x
        for part in (1, 2):
          h = self.conv(F.relu(self.batch_norm(h, f"{name}.norm{part}")), f"{name}.conv{part}")
        x = torch.cat([x, h], 1)
        layer += 1
      if index < 4:
        name = f"features.transition{index}"
        x = self.conv(F.relu(self.batch_norm(x, f"{name}.norm")), f"{name}.conv")
        if plain:
          x = F.avg_pool2d(x, 2, 2)
          continue
        logits = self.trunk(x, f"{name}.pool.logit")
        logits = self.gated(logits, f"{name}.pool.logit.conv3", f"{name}.pool.logit.bn3")
        x = self.lip(x, logits, 2, 2, 0)
    x = F.relu(self.batch_norm(x, "features.norm5"))
    weights = self.weights["classifier.weight"], self.weights["classifier.bias"]
    return F.linear(x.mean((2, 3)), *weights)
