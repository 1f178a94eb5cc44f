"""The inference guide's function and its FastAPI server: one adapter, one process.

python -m benchmarks.peers.guide BASE ADAPTER PORT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def load(base: str, adapter: str) -> tuple[Any, Any]:
    """Return the guide's LoRA model and its tokenizer; the base comes from a folder."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    return PeftModel.from_pretrained(model, adapter), AutoTokenizer.from_pretrained(base)


def predict_sentiment(
    text: str | list[str], model: Any, tokenizer: Any, return_scores: bool = False
) -> Any:
    """Return a label, or with its scores a dict, of a text; of several texts a list of them."""
    is_single = isinstance(text, str)
    texts = [text] if is_single else text
    inputs = tokenizer(texts, return_tensors="pt", truncation=True, padding=True, max_length=128)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    probabilities = torch.softmax(logits, dim=-1)
    predictions = torch.argmax(logits, dim=-1).cpu().numpy()
    results: list[Any] = []
    for index, prediction in enumerate(predictions):
        label = "Positive" if prediction == 1 else "Negative"
        confidence = probabilities[index][prediction].item()
        if return_scores:
            scores = {
                "Negative": probabilities[index][0].item(),
                "Positive": probabilities[index][1].item(),
            }
            results.append({"prediction": label, "confidence": confidence, "probabilities": scores})
        else:
            results.append(label)
    return results[0] if is_single else results


class SentimentRequest(BaseModel):
    texts: list[str]
    return_scores: bool | None = False


class SentimentResponse(BaseModel):
    results: list[dict[str, Any]]


def make_app(model: Any, tokenizer: Any) -> FastAPI:
    """Return the guide's service. Its forward runs on the event loop, as the guide has it."""
    app = FastAPI()

    @app.post("/predict", response_model=SentimentResponse)
    async def predict(request: SentimentRequest) -> dict[str, Any]:
        try:
            results = predict_sentiment(
                request.texts, model, tokenizer, return_scores=bool(request.return_scores)
            )
            if not request.return_scores:
                results = [{"prediction": result} for result in results]
            return {"results": results}
        except Exception as error:
            raise HTTPException(status_code=500, detail=str(error)) from error

    return app


if __name__ == "__main__":
    import uvicorn

    base, adapter, port = sys.argv[1:]
    uvicorn.run(make_app(*load(base, adapter)), port=int(port), log_level="warning")
