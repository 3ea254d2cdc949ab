"""What a seed may be, for every command alike."""

from lwz_trainer.errors import UserError

__all__ = ["check_seed"]


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises a UserError for a seed that no non-negative int64 holds."""
    if not 0 <= seed < 2**63:
        raise UserError(f"{name} must be at least 0 and below 2**63, got {seed}")
