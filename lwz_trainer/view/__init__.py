"""The run viewer: one self-contained HTML page with a run's curves and samples."""

from lwz_trainer.view.page import write_page

__all__ = ["write_page"]
