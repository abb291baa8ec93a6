"""Fused forwards of basic blocks and of whole networks; parameters and modules are those of the plain classes."""

from torch import Tensor, nn

from megabatch.kernels.dispatch import Backend
from megabatch.nn.alexnet import AlexNet
from megabatch.nn.fused.bottleneck import run_blocks, run_shortcut
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.norm_act import is_hooked, norm_act
from megabatch.nn.fused.stem import norm_relu_pool, stem_convolution
from megabatch.nn.resnet import BasicBlock, ResNet, global_average_then_linear
from megabatch.nn.small import ResNet8
from megabatch.nn.vgg import VGGStage


class FusedBasicBlock(BasicBlock):
    """`BasicBlock` that runs each batch norm, residual sum and ReLU as one operation."""

    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, convolve(self.conv1, x, self.backend), backend=self.backend)
        y = convolve(self.conv2, y, self.backend)
        identity = run_shortcut(self.downsample, x, self.backend)
        return norm_act(self.bn2, y, residual=identity, backend=self.backend)


class FusedResNet(ResNet):
    """`ResNet` that runs its stem's batch norm, ReLU and pooling as one operation, and bottlenecks as one chain."""

    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu_pool(self.bn1, self.maxpool, stem_convolution(self.conv1, x, self.backend), backend=self.backend)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        # Hooks of a stage run only if the stage is called, which ends the chain of pending outputs.
        if any(map(is_hooked, stages)):
            for stage in stages:
                x = stage(x)
        else:
            x = run_blocks((block for stage in stages for block in stage), x)
        return global_average_then_linear(x, self.fc)


class FusedResNet8(ResNet8):
    """`ResNet8` that runs its stem's batch norm and ReLU as one operation."""

    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        x = norm_act(self.bn1, self.pool(convolve(self.conv1, x, self.backend)), backend=self.backend)
        return global_average_then_linear(self.layer3(self.layer2(self.layer1(x))), self.fc)


class FusedVGGStage(VGGStage):
    """`VGGStage` that runs each batch norm and ReLU as one operation."""

    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, self.pool(convolve(self.conv1, x, self.backend)), backend=self.backend)
        return norm_act(self.bn2, convolve(self.conv2, y, self.backend), backend=self.backend)


class FusedAlexNet(AlexNet):
    """`AlexNet` that runs each batch norm and the ReLU behind it as one operation."""

    backend: Backend

    def forward(self, x: Tensor) -> Tensor:
        # Hooks of the sequence run only if it is called as a whole.
        if is_hooked(self.features):
            return super().forward(x)
        layers = iter(self.features)
        for layer in layers:
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                next(layers)  # the ReLU behind it, which norm_act includes
                x = norm_act(layer, x, backend=self.backend)
            else:
                x = layer(x)
        return self.classify(x)
