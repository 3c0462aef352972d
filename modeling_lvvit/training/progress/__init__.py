"""What a training run says of itself: a bar or plain lines, evaluations, duration and memory, pictures, and where everything lies."""

from .figure import PredictionFigure as PredictionFigure
from .figure import tensorboard_callback as tensorboard_callback
from .places import describe_outputs as describe_outputs
from .places import modification_times as modification_times
from .run_progress import use_run_progress as use_run_progress
