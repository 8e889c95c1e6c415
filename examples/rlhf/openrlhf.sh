#!/usr/bin/env bash
# PPO with OpenRLHF (0.10.2 and later: hierarchical flags) on one machine with 8 GPUs; hafrm gives the reward.
#   HAFRM_REWARD=runs/haf examples/rlhf/openrlhf.sh POLICY PROMPTS.jsonl OUT
# PROMPTS.jsonl: rows with "prompt" (messages) and "label" (the same messages as JSON text).
set -euo pipefail

policy=${1:?a causal LM} prompts=${2:?a file of prompts} out=${3:?a folder}
here=$(cd "$(dirname "$0")" && pwd)

exec python -m openrlhf.cli.train_ppo_ray \
  --actor.model_name_or_path "$policy" \
  --reward.remote_url "$here/openrlhf_reward.py" \
  --data.prompt_dataset "$prompts" --data.input_key prompt --data.label_key label \
  --data.apply_chat_template --data.max_len 1024 --rollout.max_new_tokens 512 \
  --algo.advantage.estimator gae --algo.kl.init_coef 0.05 \
  --rollout.batch_size 128 --rollout.n_samples_per_prompt 4 --train.batch_size 512 \
  --actor.adam.lr 5e-7 --critic.adam.lr 9e-6 --actor.gradient_checkpointing_enable \
  --ref.num_nodes 1 --ref.num_gpus_per_node 8 --actor.num_nodes 1 --actor.num_gpus_per_node 8 \
  --vllm.num_engines 4 --vllm.tensor_parallel_size 2 --vllm.gpu_memory_utilization 0.6 \
  --vllm.enable_sleep --train.colocate_all --ds.enable_sleep --ds.zero_stage 3 --ds.param_dtype bf16 \
  --ckpt.output_dir "$out"
