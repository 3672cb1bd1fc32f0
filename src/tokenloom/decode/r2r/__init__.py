"""R2R: token-level routing between a small and a large model, its labels and its router's training.

labels = label(small, large, prompts, tokenizer, judge)           # where the small model's token leads elsewhere
router = Router(small.get_input_embeddings().weight)
result = fit(router, labels)
save_router(router, "router.safetensors", threshold=result.threshold)
small.generate(..., custom_generate=decode.loop("r2r", large=large, router=router, threshold=result.threshold))
"""

from tokenloom.decode.r2r.labels import Labels as Labels
from tokenloom.decode.r2r.labels import Question as Question
from tokenloom.decode.r2r.labels import judge_by_model as judge_by_model
from tokenloom.decode.r2r.labels import label as label
from tokenloom.decode.r2r.routing import R2R as R2R
from tokenloom.decode.r2r.training import Fitted as Fitted
from tokenloom.decode.r2r.training import fit as fit
from tokenloom.decode.r2r.training import load_router as load_router
from tokenloom.decode.r2r.training import save_router as save_router
from tokenloom.methods.decoding.r2r import Router as Router
