"""vLLM's /classify behind Ray Serve LLM: replicas on a cluster, with hafrm's front server in front of them.

python examples/serve/ray_serve_llm.py RUN/model/reward
hafrm verify http://HEAD:8000 --golden RUN/model/reward
hafrm serve RUN --upstream http://HEAD:8000 --port 8080
"""

import sys

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

config = LLMConfig(
    model_loading_config={"model_id": "reward", "model_source": sys.argv[1]},
    deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 8}},
    # chunked prefill pools the last token wrongly (vllm#48831)
    engine_kwargs={"runner": "pooling", "enable_chunked_prefill": False},
)
serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)
