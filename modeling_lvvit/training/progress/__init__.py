"""What a training run says of itself: a bar or plain lines, evaluations, duration and memory, pictures, and where everything lies."""

from .figure import PredictionFigure as PredictionFigure
from .places import describe_outputs as describe_outputs
from .run_progress import use_run_progress as use_run_progress
