"""Handler of Hugging Face Inference Endpoints; it lies in every checkpoint folder that gaml_hf writes."""

from typing import Any

from transformers import pipeline


class EndpointHandler:
    """
    Serves this repository: classifies texts, and tells for each at which layer it left.

    Args:
        path (`str`): the folder of the repository.
    """

    def __init__(self, path: str = ""):
        # The code is this repository's, at the revision that the endpoint was made with, as this file is.
        self.pipeline = pipeline("text-classification", model=path or ".", trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """
        Args:
            data (`dict`): `inputs`, a text, a `{"text": ..., "text_pair": ...}` or a list of these, and optionally
                `parameters`, what the pipeline takes: the exit strategy and its number, `top_k`, `batch_size`, and
                `on_error`, with which one bad row costs that row alone.

        Returns:
            `list`: for each input what the pipeline answers for it.

        Raises:
            ValueError: there are no inputs, the parameters are not a dictionary, or the pipeline refuses one of them
                or a row.
            TypeError: a row is no text.
        """
        if not isinstance(data, dict):
            raise ValueError(f'The request must be a dictionary, such as {{"inputs": "A text."}}. Got {data!r}.')
        inputs = data.get("inputs")
        if not inputs:
            raise ValueError(f"`inputs` must be a text or a non-empty list of texts. Got `inputs={inputs!r}`.")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(
                f'`parameters` must be a dictionary, such as {{"patience": 3}}. Got `parameters={parameters!r}`.'
            )
        if "num_workers" in parameters:
            raise ValueError("`num_workers` would start processes, which is not for a request to say: leave it out.")
        return self.pipeline(inputs if isinstance(inputs, list) else [inputs], **parameters)
