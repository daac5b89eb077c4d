"""Models quantized with torch.ao, as Bitsmith's: the same integers, without torch.ao."""

from .migrate import migrate
from .names import is_torch_ao

__all__ = ["is_torch_ao", "migrate"]
