#!/usr/bin/env bash
# GRPO with verl (0.7 and later) on one machine with 8 GPUs; hafrm computes the reward.
#   HAFRM_REWARD=runs/haf examples/rlhf/verl.sh POLICY train.parquet test.parquet OUT
# HAFRM_IMPLICIT_WEIGHT=0.5 makes the implicit reward of a run a second one (GDPO; verl of March 2026 or later).
# If the reward model is too large for that, reward.reward_model.enable=True and
# reward.reward_model.model_path=runs/haf/model/reward let verl serve the stock directory itself.
set -euo pipefail

policy=${1:?a causal LM} train=${2:?Parquet from verl_reward.py} test=${3:?Parquet} out=${4:?a folder}
here=$(cd "$(dirname "$0")" && pwd)
estimator=(algorithm.adv_estimator=grpo)
if [[ -n ${HAFRM_IMPLICIT_WEIGHT:-} ]]; then
  estimator=(algorithm.adv_estimator=gdpo reward.reward_manager.name=gdpo
    '+algorithm.gdpo_reward_keys=["reward","implicit"]'
    "+algorithm.gdpo_reward_weights=[1.0,$HAFRM_IMPLICIT_WEIGHT]")
fi

exec python -m verl.trainer.main_ppo \
  "${estimator[@]}" algorithm.use_kl_in_reward=False \
  data.train_files="$train" data.val_files="$test" data.train_batch_size=128 \
  data.max_prompt_length=512 data.max_response_length=512 data.filter_overlong_prompts=True \
  actor_rollout_ref.model.path="$policy" \
  actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.01 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
  reward.custom_reward_function.path="$here/verl_reward.py" \
  reward.custom_reward_function.name=compute_score \
  trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=50 trainer.test_freq=10 \
  trainer.default_local_dir="$out"
