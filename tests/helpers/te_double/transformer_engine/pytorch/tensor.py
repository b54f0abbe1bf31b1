"""Types that megatron-core asks tensors about; none is ever made."""


class QuantizedTensor: ...
