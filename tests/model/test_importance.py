"""The rule that says what matters first, held against the names of real models.

A row of a table is ``name  part  layer  level``. ``#7`` in a name stands for the blocks of its family, all of which are
listed, and for block 7 in the row's own expectation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import ConfigurationError
from holotensor_net.model.importance import Opinion, Rank, layer_order, rank_names
from holotensor_net.values import Priority

CRITICAL, HIGH, NORMAL, LOW = Priority.CRITICAL, Priority.HIGH, Priority.NORMAL, Priority.LOW

FAMILIES = {
    "Llama": """ 32
        model.embed_tokens.weight                                   embedding     -   CRITICAL
        model.layers.#0.self_attn.q_proj.weight                     attention     0   CRITICAL
        model.layers.#0.mlp.gate_proj.weight                        feed_forward  0   CRITICAL
        model.layers.#1.self_attn.q_proj.weight                     attention     1   HIGH
        model.layers.#1.mlp.down_proj.weight                        feed_forward  1   NORMAL
        model.layers.#15.input_layernorm.weight                     norm          15  CRITICAL
        model.layers.#15.post_attention_layernorm.weight            norm          15  CRITICAL
        model.layers.#15.self_attn.k_proj.weight                    attention     15  HIGH
        model.layers.#15.self_attn.v_proj.weight                    attention     15  HIGH
        model.layers.#15.self_attn.o_proj.weight                    attention     15  HIGH
        model.layers.#15.self_attn.rotary_emb.inv_freq              unused        15  LOW
        model.layers.#15.mlp.gate_proj.weight                       feed_forward  15  NORMAL
        model.layers.#15.mlp.up_proj.weight                         feed_forward  15  NORMAL
        model.layers.#30.self_attn.q_proj.weight                    attention     30  HIGH
        model.layers.#31.self_attn.q_proj.weight                    attention     31  CRITICAL
        model.layers.#31.mlp.down_proj.weight                       feed_forward  31  CRITICAL
        model.norm.weight                                           norm          -   CRITICAL
        lm_head.weight                                              head          -   CRITICAL
    """,
    "Llama, as first published": """ 32
        tok_embeddings.weight                                       embedding     -   CRITICAL
        layers.#0.attention.wq.weight                               attention     0   CRITICAL
        layers.#9.attention.wq.weight                               attention     9   HIGH
        layers.#9.attention.wo.weight                               attention     9   HIGH
        layers.#9.feed_forward.w1.weight                            feed_forward  9   NORMAL
        layers.#9.feed_forward.w2.weight                            feed_forward  9   NORMAL
        layers.#9.attention_norm.weight                             norm          9   CRITICAL
        layers.#9.ffn_norm.weight                                   norm          9   CRITICAL
        norm.weight                                                 norm          -   CRITICAL
        output.weight                                               head          -   CRITICAL
        rope.freqs                                                  unused        -   LOW
    """,
    "Mixtral": """ 32
        model.layers.#0.block_sparse_moe.experts.0.w1.weight        feed_forward  0   CRITICAL
        model.layers.#7.self_attn.q_proj.weight                     attention     7   HIGH
        model.layers.#7.block_sparse_moe.gate.weight                router        7   HIGH
        model.layers.#7.block_sparse_moe.experts.7.w1.weight        feed_forward  7   NORMAL
        model.layers.#7.block_sparse_moe.experts.7.w2.weight        feed_forward  7   NORMAL
        model.layers.#31.block_sparse_moe.gate.weight               router        31  CRITICAL
    """,
    "Granite MoE": """ 24
        model.layers.#7.block_sparse_moe.input_linear.weight        feed_forward  7   NORMAL
        model.layers.#7.block_sparse_moe.output_linear.weight       feed_forward  7   NORMAL
        model.layers.#7.block_sparse_moe.router.layer.weight        router        7   HIGH
    """,
    "Qwen 2, with a vision tower": """ 28
        visual.patch_embed.proj.weight                              embedding     -   CRITICAL
        visual.blocks.#0.attn.qkv.weight                            attention     0   CRITICAL
        visual.blocks.#5.attn.qkv.weight                            attention     5   HIGH
        visual.blocks.#5.attn.proj.weight                           attention     5   HIGH
        visual.blocks.#5.attn.proj.bias                             attention     5   HIGH
        visual.blocks.#5.mlp.fc1.weight                             feed_forward  5   NORMAL
        visual.blocks.#5.mlp.fc2.bias                               feed_forward  5   HIGH
        visual.blocks.#5.norm1.weight                               norm          5   CRITICAL
        visual.blocks.#27.mlp.fc2.weight                            feed_forward  27  CRITICAL
        visual.merger.ln_q.weight                                   norm          -   CRITICAL
        visual.merger.mlp.0.weight                                  feed_forward  -   HIGH
        visual.deepstack_merger_list.0.linear_fc1.weight            feed_forward  -   HIGH
        model.embed_tokens.weight                                   embedding     -   CRITICAL
        model.layers.#0.self_attn.q_proj.weight                     attention     0   CRITICAL
        model.layers.#5.self_attn.q_proj.bias                       attention     5   HIGH
        model.layers.#5.mlp.down_proj.weight                        feed_forward  5   NORMAL
        model.layers.#27.mlp.down_proj.weight                       feed_forward  27  CRITICAL
        lm_head.weight                                              head          -   CRITICAL
    """,
    "Qwen 3.5 MoE": """ 40
        model.language_model.embed_tokens.weight                    embedding     -   CRITICAL
        model.language_model.layers.#4.input_layernorm.weight       norm          4   CRITICAL
        model.language_model.layers.#4.linear_attn.A_log            attention     4   HIGH
        model.language_model.layers.#4.linear_attn.dt_bias          attention     4   HIGH
        model.language_model.layers.#4.linear_attn.conv1d.weight    attention     4   HIGH
        model.language_model.layers.#4.linear_attn.in_proj_qkv.weight  attention  4   HIGH
        model.language_model.layers.#4.linear_attn.norm.weight      norm          4   CRITICAL
        model.language_model.layers.#4.self_attn.q_norm.weight      norm          4   CRITICAL
        model.language_model.layers.#4.mlp.gate.weight              router        4   HIGH
        model.language_model.layers.#4.mlp.shared_expert_gate.weight  router      4   HIGH
        model.language_model.layers.#4.mlp.shared_expert.up_proj.weight  feed_forward  4  NORMAL
        model.language_model.layers.#4.mlp.experts.100.down_proj.weight  feed_forward  4  NORMAL
        model.language_model.layers.#4.mlp.experts.gate_up_proj     feed_forward  4   NORMAL
        model.language_model.layers.#39.mlp.experts.100.up_proj.weight  feed_forward  39  CRITICAL
        mtp.layers.#0.self_attn.q_proj.weight                       unused        0   LOW
        mtp.fc.weight                                               unused        -   LOW
    """,
    "Qwen, packed by MLX": """ 32
        language_model.model.embed_tokens.scales                    embedding     -   CRITICAL
        language_model.model.layers.#9.mlp.up_proj.scales           feed_forward  9   NORMAL
        language_model.model.layers.#9.mlp.up_proj.biases           feed_forward  9   NORMAL
        language_model.lm_head.biases                               head          -   CRITICAL
    """,
    "DeepSeek": """ 27
        model.layers.#9.self_attn.q_a_proj.weight                   attention     9   HIGH
        model.layers.#9.self_attn.kv_a_proj_with_mqa.weight         attention     9   HIGH
        model.layers.#9.self_attn.kv_a_layernorm.weight             norm          9   CRITICAL
        model.layers.#9.mlp.gate.weight                             router        9   HIGH
        model.layers.#9.mlp.gate.e_score_correction_bias            router        9   HIGH
        model.layers.#9.mlp.shared_experts.gate_proj.weight         feed_forward  9   NORMAL
        model.layers.#9.mlp.experts.25.up_proj.weight               feed_forward  9   NORMAL
        model.layers.#9.mlp.experts.25.up_proj.weight_scale_inv     feed_forward  9   NORMAL
        model.sam_model.neck.0.weight                               other         -   NORMAL
    """,
    "Gemma 3": """ 26
        multi_modal_projector.mm_input_projection_weight            projection    -   HIGH
        multi_modal_projector.mm_soft_emb_norm.weight               norm          -   CRITICAL
        language_model.model.layers.#9.pre_feedforward_layernorm.weight  norm     9   CRITICAL
        language_model.model.layers.#9.self_attn.k_norm.weight      norm          9   CRITICAL
        language_model.model.layers.#9.mlp.gate_proj.weight         feed_forward  9   NORMAL
        vision_tower.vision_model.embeddings.patch_embedding.weight  embedding    -   CRITICAL
        vision_tower.vision_model.encoder.layers.#9.mlp.fc1.weight  feed_forward  9   NORMAL
        vision_tower.vision_model.encoder.layers.#25.mlp.fc1.weight  feed_forward  25  CRITICAL
    """,
    "MiniCPM-V": """ 28
        resampler.attn.in_proj_weight                               attention     -   HIGH
        resampler.ln_q.bias                                         norm          -   CRITICAL
        resampler.kv_proj.weight                                    projection    -   HIGH
        vpm.embeddings.position_embedding.weight                    embedding     -   CRITICAL
        vpm.encoder.layers.#9.self_attn.out_proj.weight             attention     9   HIGH
    """,
    "GPT-2": """ 12
        wte.weight                                                  embedding     -   CRITICAL
        wpe.weight                                                  embedding     -   CRITICAL
        h.#0.attn.c_attn.weight                                     attention     0   CRITICAL
        h.#0.mlp.c_proj.weight                                      feed_forward  0   CRITICAL
        h.#5.ln_1.weight                                            norm          5   CRITICAL
        h.#5.ln_2.bias                                              norm          5   CRITICAL
        h.#5.attn.bias                                              unused        5   LOW
        h.#5.attn.masked_bias                                       unused        5   LOW
        h.#5.attn.c_attn.weight                                     attention     5   HIGH
        h.#5.attn.c_attn.bias                                       attention     5   HIGH
        h.#5.attn.c_proj.weight                                     attention     5   HIGH
        h.#5.mlp.c_fc.weight                                        feed_forward  5   NORMAL
        h.#5.mlp.c_fc.bias                                          feed_forward  5   HIGH
        h.#5.mlp.c_proj.weight                                      feed_forward  5   NORMAL
        h.#11.mlp.c_proj.weight                                     feed_forward  11  CRITICAL
        ln_f.weight                                                 norm          -   CRITICAL
    """,
    "GPT-2, with its head": """ 48
        transformer.wte.weight                                      embedding     -   CRITICAL
        transformer.h.#10.attn.c_attn.weight                        attention     10  HIGH
        transformer.h.#10.mlp.c_fc.weight                           feed_forward  10  NORMAL
        transformer.h.#47.attn.c_attn.weight                        attention     47  CRITICAL
        transformer.ln_f.bias                                       norm          -   CRITICAL
        lm_head.weight                                              head          -   CRITICAL
    """,
    "GPT-2, in TensorFlow": """ 12
        model/wte                                                   embedding     -   CRITICAL
        model/h#5/attn/c_attn/w                                     attention     5   HIGH
        model/h#5/mlp/c_fc/w                                        feed_forward  5   NORMAL
        model/h#5/ln_1/g                                            norm          5   CRITICAL
        model/h#11/mlp/c_fc/w                                       feed_forward  11  CRITICAL
    """,
    "GPT-NeoX": """ 16
        gpt_neox.embed_in.weight                                    embedding     -   CRITICAL
        gpt_neox.layers.#4.attention.query_key_value.weight         attention     4   HIGH
        gpt_neox.layers.#4.attention.query_key_value.bias           attention     4   HIGH
        gpt_neox.layers.#4.attention.dense.weight                   attention     4   HIGH
        gpt_neox.layers.#4.attention.bias                           unused        4   LOW
        gpt_neox.layers.#4.attention.rotary_emb.inv_freq            unused        4   LOW
        gpt_neox.layers.#4.mlp.dense_h_to_4h.weight                 feed_forward  4   NORMAL
        gpt_neox.layers.#4.post_attention_layernorm.weight          norm          4   CRITICAL
        gpt_neox.final_layer_norm.weight                            norm          -   CRITICAL
        embed_out.weight                                            head          -   CRITICAL
    """,
    "Falcon": """ 60
        transformer.word_embeddings.weight                          embedding     -   CRITICAL
        transformer.h.#30.ln_attn.weight                            norm          30  CRITICAL
        transformer.h.#30.ln_mlp.bias                               norm          30  CRITICAL
        transformer.h.#30.self_attention.query_key_value.weight     attention     30  HIGH
        transformer.h.#30.self_attention.dense.weight               attention     30  HIGH
        transformer.h.#30.mlp.dense_4h_to_h.weight                  feed_forward  30  NORMAL
        transformer.h.#59.mlp.dense_4h_to_h.weight                  feed_forward  59  CRITICAL
    """,
    "Bloom": """ 70
        word_embeddings.weight                                      embedding     -   CRITICAL
        word_embeddings_layernorm.weight                            norm          -   CRITICAL
        h.#13.input_layernorm.bias                                  norm          13  CRITICAL
        h.#13.self_attention.query_key_value.weight                 attention     13  HIGH
        h.#13.mlp.dense_h_to_4h.weight                              feed_forward  13  NORMAL
        h.#69.mlp.dense_h_to_4h.weight                              feed_forward  69  CRITICAL
    """,
    "Phi 2": """ 32
        layers.0.wte.weight                                         embedding     0   CRITICAL
        layers.#10.ln.weight                                        norm          10  CRITICAL
        layers.#10.mixer.Wqkv.weight                                attention     10  HIGH
        layers.#10.mixer.out_proj.weight                            attention     10  HIGH
        layers.#10.mlp.fc1.weight                                   feed_forward  10  NORMAL
        layers.33.linear.weight                                     feed_forward  33  CRITICAL
    """,
    "Phi 3": """ 32
        model.layers.#10.self_attn.qkv_proj.weight                  attention     10  HIGH
        model.layers.#10.mlp.gate_up_proj.weight                    feed_forward  10  NORMAL
    """,
    "OPT": """ 24
        model.decoder.embed_tokens.weight                           embedding     -   CRITICAL
        model.decoder.embed_positions.weight                        embedding     -   CRITICAL
        model.decoder.layers.#3.self_attn.k_proj.weight             attention     3   HIGH
        model.decoder.layers.#3.self_attn_layer_norm.weight         norm          3   CRITICAL
        model.decoder.layers.#3.fc1.weight                          feed_forward  3   NORMAL
        model.decoder.layers.#3.fc2.bias                            feed_forward  3   HIGH
        model.decoder.layers.#3.final_layer_norm.weight             norm          3   CRITICAL
        model.decoder.final_layer_norm.weight                       norm          -   CRITICAL
    """,
    "MPT": """ 32
        transformer.blocks.#3.attn.Wqkv.weight                      attention     3   HIGH
        transformer.blocks.#3.ffn.up_proj.weight                    feed_forward  3   NORMAL
        transformer.blocks.#3.norm_1.weight                         norm          3   CRITICAL
        transformer.norm_f.weight                                   norm          -   CRITICAL
    """,
    "Molmo": """ 28
        model.transformer.wte.embedding                             embedding     -   CRITICAL
        model.transformer.blocks.#3.att_proj.weight                 attention     3   HIGH
        model.transformer.blocks.#3.attn_out.weight                 attention     3   HIGH
        model.transformer.blocks.#3.ff_proj.weight                  feed_forward  3   NORMAL
        model.transformer.blocks.#3.ff_out.weight                   feed_forward  3   NORMAL
        model.transformer.ff_out.weight                             head          -   CRITICAL
    """,
    "Mamba and Nemotron": """ 52
        backbone.embeddings.weight                                  embedding     -   CRITICAL
        backbone.layers.#3.mixer.A_log                              attention     3   HIGH
        backbone.layers.#3.mixer.conv1d.weight                      attention     3   HIGH
        backbone.layers.#3.mixer.in_proj.weight                     attention     3   HIGH
        backbone.layers.#3.mixer.experts.0.up_proj.weight           feed_forward  3   NORMAL
        backbone.layers.#3.norm.weight                              norm          3   CRITICAL
        backbone.norm_f.weight                                      norm          -   CRITICAL
    """,
    "GGUF": """ 36
        token_embd.weight                                           embedding     -   CRITICAL
        blk.#3.attn_q.weight                                        attention     3   HIGH
        blk.#3.attn_output.weight                                   attention     3   HIGH
        blk.#3.attn_norm.weight                                     norm          3   CRITICAL
        blk.#3.ssm_out.weight                                       attention     3   HIGH
        blk.#3.ffn_gate_inp.weight                                  router        3   HIGH
        blk.#3.ffn_gate_exps.weight                                 feed_forward  3   NORMAL
        blk.#3.ffn_down.weight                                      feed_forward  3   NORMAL
        blk.#35.ffn_down.weight                                     feed_forward  35  CRITICAL
        output_norm.weight                                          norm          -   CRITICAL
        output.weight                                               head          -   CRITICAL
    """,
    "BERT": """ 12
        bert.embeddings.word_embeddings.weight                      embedding     -   CRITICAL
        bert.embeddings.position_embeddings.weight                  embedding     -   CRITICAL
        bert.embeddings.token_type_embeddings.weight                embedding     -   CRITICAL
        bert.embeddings.LayerNorm.gamma                             norm          -   CRITICAL
        bert.embeddings.position_ids                                unused        -   LOW
        bert.encoder.layer.#0.attention.self.query.weight           attention     0   CRITICAL
        bert.encoder.layer.#4.attention.self.query.weight           attention     4   HIGH
        bert.encoder.layer.#4.attention.self.key.bias               attention     4   HIGH
        bert.encoder.layer.#4.attention.output.dense.weight         attention     4   HIGH
        bert.encoder.layer.#4.attention.output.LayerNorm.weight     norm          4   CRITICAL
        bert.encoder.layer.#4.intermediate.dense.weight             feed_forward  4   NORMAL
        bert.encoder.layer.#4.intermediate.dense.bias               feed_forward  4   HIGH
        bert.encoder.layer.#4.output.dense.weight                   feed_forward  4   NORMAL
        bert.encoder.layer.#4.output.LayerNorm.beta                 norm          4   CRITICAL
        bert.encoder.layer.#11.output.dense.weight                  feed_forward  11  CRITICAL
        bert.pooler.dense.weight                                    head          -   CRITICAL
        cls.predictions.bias                                        head          -   CRITICAL
        cls.predictions.transform.dense.weight                      head          -   CRITICAL
        cls.predictions.transform.LayerNorm.weight                  norm          -   CRITICAL
        cls.predictions.decoder.weight                              head          -   CRITICAL
        cls.seq_relationship.weight                                 head          -   CRITICAL
    """,
    "DistilBERT": """ 6
        distilbert.transformer.layer.#3.attention.q_lin.weight      attention     3   HIGH
        distilbert.transformer.layer.#3.ffn.lin1.weight             feed_forward  3   NORMAL
        distilbert.transformer.layer.#3.sa_layer_norm.weight        norm          3   CRITICAL
        vocab_transform.weight                                      head          -   CRITICAL
        vocab_layer_norm.weight                                     norm          -   CRITICAL
        vocab_projector.weight                                      head          -   CRITICAL
    """,
    "T5": """ 12
        shared.weight                                               embedding     -   CRITICAL
        encoder.embed_tokens.weight                                 embedding     -   CRITICAL
        encoder.block.#0.layer.0.SelfAttention.q.weight             attention     0   CRITICAL
        encoder.block.#0.layer.0.SelfAttention.relative_attention_bias.weight  attention  0  CRITICAL
        encoder.block.#4.layer.0.SelfAttention.o.weight             attention     4   HIGH
        encoder.block.#4.layer.0.layer_norm.weight                  norm          4   CRITICAL
        encoder.block.#4.layer.1.DenseReluDense.wi_0.weight         feed_forward  4   NORMAL
        encoder.block.#4.layer.1.DenseReluDense.wo.weight           feed_forward  4   NORMAL
        encoder.block.#11.layer.1.DenseReluDense.wo.weight          feed_forward  11  CRITICAL
        encoder.final_layer_norm.weight                             norm          -   CRITICAL
        decoder.block.#0.layer.1.EncDecAttention.k.weight           attention     0   CRITICAL
        decoder.block.#4.layer.1.EncDecAttention.k.weight           attention     4   HIGH
        decoder.block.#4.layer.2.DenseReluDense.wi.weight           feed_forward  4   NORMAL
        decoder.block.#11.layer.2.DenseReluDense.wo.weight          feed_forward  11  CRITICAL
        decoder.final_layer_norm.weight                             norm          -   CRITICAL
        lm_head.weight                                              head          -   CRITICAL
    """,
    "Whisper": """ 24
        model.encoder.conv1.weight                                  convolution   -   CRITICAL
        model.encoder.conv2.bias                                    convolution   -   CRITICAL
        model.encoder.embed_positions.weight                        embedding     -   CRITICAL
        model.encoder.layers.#5.self_attn.k_proj.weight             attention     5   HIGH
        model.encoder.layers.#5.fc1.weight                          feed_forward  5   NORMAL
        model.encoder.layers.#23.fc1.weight                         feed_forward  23  CRITICAL
        model.encoder.layer_norm.weight                             norm          -   CRITICAL
        model.decoder.embed_tokens.weight                           embedding     -   CRITICAL
        model.decoder.layers.#0.encoder_attn.q_proj.weight          attention     0   CRITICAL
        model.decoder.layers.#5.encoder_attn.q_proj.weight          attention     5   HIGH
        model.decoder.layers.#5.encoder_attn_layer_norm.weight      norm          5   CRITICAL
        model.decoder.layers.#5.fc2.weight                          feed_forward  5   NORMAL
        model.decoder.layer_norm.weight                             norm          -   CRITICAL
        proj_out.weight                                             head          -   CRITICAL
    """,
    "CLIP": """ 12
        text_model.embeddings.token_embedding.weight                embedding     -   CRITICAL
        text_model.embeddings.position_ids                          unused        -   LOW
        text_model.encoder.layers.#5.layer_norm1.weight             norm          5   CRITICAL
        text_model.encoder.layers.#5.self_attn.out_proj.weight      attention     5   HIGH
        text_model.encoder.layers.#5.mlp.fc1.weight                 feed_forward  5   NORMAL
        text_model.encoder.layers.#11.mlp.fc1.weight                feed_forward  11  CRITICAL
        text_model.final_layer_norm.weight                          norm          -   CRITICAL
        vision_model.embeddings.class_embedding                     embedding     -   CRITICAL
        vision_model.embeddings.patch_embedding.weight              embedding     -   CRITICAL
        vision_model.pre_layrnorm.weight                            norm          -   CRITICAL
        vision_model.encoder.layers.#5.mlp.fc2.weight               feed_forward  5   NORMAL
        vision_model.post_layernorm.bias                            norm          -   CRITICAL
        text_projection.weight                                      head          -   CRITICAL
        visual_projection.weight                                    head          -   CRITICAL
        logit_scale                                                 other         -   HIGH
    """,
    "ViT": """ 12
        vit.embeddings.cls_token                                    embedding     -   CRITICAL
        vit.embeddings.patch_embeddings.projection.weight           embedding     -   CRITICAL
        vit.encoder.layer.#5.attention.attention.query.weight       attention     5   HIGH
        vit.encoder.layer.#5.attention.output.dense.weight          attention     5   HIGH
        vit.encoder.layer.#5.intermediate.dense.weight              feed_forward  5   NORMAL
        vit.encoder.layer.#5.output.dense.weight                    feed_forward  5   NORMAL
        vit.encoder.layer.#5.layernorm_before.weight                norm          5   CRITICAL
        vit.layernorm.weight                                        norm          -   CRITICAL
        classifier.weight                                           head          -   CRITICAL
    """,
    "ViT, in timm": """ 12
        cls_token                                                   embedding     -   CRITICAL
        pos_embed                                                   embedding     -   CRITICAL
        patch_embed.proj.weight                                     embedding     -   CRITICAL
        blocks.#5.attn.qkv.weight                                   attention     5   HIGH
        blocks.#5.mlp.fc1.weight                                    feed_forward  5   NORMAL
        norm.weight                                                 norm          -   CRITICAL
        head.weight                                                 head          -   CRITICAL
    """,
    "ResNet": """ 5
        conv1.weight                                                convolution   -   CRITICAL
        bn1.running_mean                                            norm          -   CRITICAL
        bn1.num_batches_tracked                                     unused        -   LOW
        layer#1.0.conv1.weight                                      convolution   1   NORMAL
        layer#1.0.downsample.0.weight                               convolution   1   NORMAL
        layer#4.0.conv1.weight                                      convolution   4   CRITICAL
        fc.weight                                                   head          -   CRITICAL
    """,
    "UNet of Stable Diffusion, in diffusers": """ 0
        conv_in.weight                                              convolution   -   CRITICAL
        time_embedding.linear_1.weight                              time          -   CRITICAL
        add_embedding.linear_2.weight                               embedding     -   CRITICAL
        down_blocks.0.resnets.0.conv1.weight                        convolution   0   CRITICAL
        down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight  attention  0  CRITICAL
        down_blocks.1.attentions.0.norm.weight                      norm          1   CRITICAL
        down_blocks.1.attentions.0.proj_in.weight                   attention     1   HIGH
        down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight  attention  1  HIGH
        down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.bias  attention  1  HIGH
        down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight  feed_forward  1  NORMAL
        down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight  feed_forward  1  NORMAL
        down_blocks.1.attentions.0.transformer_blocks.0.norm3.weight  norm        1   CRITICAL
        down_blocks.1.downsamplers.0.conv.weight                    convolution   1   NORMAL
        down_blocks.1.resnets.0.conv1.weight                        convolution   1   NORMAL
        down_blocks.1.resnets.0.conv_shortcut.weight                convolution   1   NORMAL
        down_blocks.1.resnets.0.norm1.weight                        norm          1   CRITICAL
        down_blocks.1.resnets.0.time_emb_proj.weight                time          1   HIGH
        down_blocks.3.resnets.1.conv2.weight                        convolution   3   NORMAL
        mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight  feed_forward  -  NORMAL
        mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight  attention  -   HIGH
        mid_block.resnets.0.conv1.weight                            convolution   -   NORMAL
        up_blocks.0.resnets.0.conv1.weight                          convolution   0   NORMAL
        up_blocks.0.upsamplers.0.conv.weight                        convolution   0   NORMAL
        up_blocks.3.resnets.0.conv1.weight                          convolution   3   CRITICAL
        up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2.weight  feed_forward  3  CRITICAL
        conv_norm_out.weight                                        norm          -   CRITICAL
        conv_out.weight                                             convolution   -   CRITICAL
    """,
    "Stable Diffusion, as first published": """ 0
        betas                                                       time          -   CRITICAL
        sqrt_one_minus_alphas_cumprod                               time          -   CRITICAL
        model_ema.decay                                             unused        -   LOW
        model_ema.diffusion_modelinput_blocks00weight               unused        -   LOW
        model.diffusion_model.time_embed.0.weight                   time          -   CRITICAL
        model.diffusion_model.label_emb.0.0.weight                  embedding     -   CRITICAL
        model.diffusion_model.input_blocks.0.0.weight               convolution   -   CRITICAL
        model.diffusion_model.input_blocks.1.0.in_layers.2.weight   convolution   1   CRITICAL
        model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2.weight  feed_forward  1  CRITICAL
        model.diffusion_model.input_blocks.3.0.op.weight            convolution   3   NORMAL
        model.diffusion_model.input_blocks.4.0.in_layers.0.weight   norm          4   CRITICAL
        model.diffusion_model.input_blocks.4.0.in_layers.2.weight   convolution   4   NORMAL
        model.diffusion_model.input_blocks.4.0.emb_layers.1.weight  time          4   HIGH
        model.diffusion_model.input_blocks.4.0.out_layers.0.bias    norm          4   CRITICAL
        model.diffusion_model.input_blocks.4.0.out_layers.3.weight  convolution   4   NORMAL
        model.diffusion_model.input_blocks.4.0.out_layers.3.bias    convolution   4   HIGH
        model.diffusion_model.input_blocks.4.0.skip_connection.weight  convolution  4  NORMAL
        model.diffusion_model.input_blocks.4.1.norm.weight          norm          4   CRITICAL
        model.diffusion_model.input_blocks.4.1.proj_in.weight       attention     4   HIGH
        model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight  attention  4  HIGH
        model.diffusion_model.input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.weight  feed_forward  4  NORMAL
        model.diffusion_model.input_blocks.11.0.in_layers.2.weight  convolution   11  NORMAL
        model.diffusion_model.middle_block.0.in_layers.2.weight     convolution   -   NORMAL
        model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight  attention  -  HIGH
        model.diffusion_model.output_blocks.0.0.in_layers.2.weight  convolution   0   NORMAL
        model.diffusion_model.output_blocks.2.1.conv.weight         convolution   2   NORMAL
        model.diffusion_model.output_blocks.11.0.out_layers.3.weight  convolution  11  CRITICAL
        model.diffusion_model.out.0.weight                          norm          -   CRITICAL
        model.diffusion_model.out.2.weight                          convolution   -   CRITICAL
        cond_stage_model.transformer.text_model.embeddings.position_ids  unused   -   LOW
        cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight  feed_forward  0  CRITICAL
        cond_stage_model.transformer.text_model.encoder.layers.5.mlp.fc1.weight  feed_forward  5  NORMAL
        cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight  feed_forward  11  CRITICAL
        conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight  attention  0  CRITICAL
        conditioner.embedders.1.model.transformer.resblocks.9.attn.in_proj_weight  attention  9  HIGH
        conditioner.embedders.1.model.transformer.resblocks.9.attn.in_proj_bias  attention  9  HIGH
        conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.weight  feed_forward  9  NORMAL
        conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight  feed_forward  31  CRITICAL
        conditioner.embedders.1.model.text_projection               head          -   CRITICAL
    """,
    "VAE, as first published": """ 0
        first_stage_model.encoder.conv_in.weight                    convolution   -   CRITICAL
        first_stage_model.encoder.down.0.block.0.conv1.weight       convolution   0   CRITICAL
        first_stage_model.encoder.down.1.block.0.norm1.weight       norm          1   CRITICAL
        first_stage_model.encoder.down.1.block.0.conv1.weight       convolution   1   NORMAL
        first_stage_model.encoder.down.1.block.0.nin_shortcut.weight  convolution  1  NORMAL
        first_stage_model.encoder.down.1.downsample.conv.weight     convolution   1   NORMAL
        first_stage_model.encoder.mid.attn_1.q.weight               attention     -   CRITICAL
        first_stage_model.encoder.mid.block_1.conv1.weight          convolution   -   CRITICAL
        first_stage_model.encoder.norm_out.weight                   norm          -   CRITICAL
        first_stage_model.encoder.conv_out.weight                   convolution   -   CRITICAL
        first_stage_model.quant_conv.weight                         convolution   -   CRITICAL
        first_stage_model.post_quant_conv.weight                    convolution   -   CRITICAL
        first_stage_model.decoder.mid.block_2.conv2.weight          convolution   -   CRITICAL
        first_stage_model.decoder.up.3.block.0.conv1.weight         convolution   3   NORMAL
        first_stage_model.decoder.up.3.upsample.conv.weight         convolution   3   NORMAL
        first_stage_model.decoder.up.0.block.0.conv1.weight         convolution   0   CRITICAL
        first_stage_model.decoder.conv_out.weight                   convolution   -   CRITICAL
    """,
    "VAE, in diffusers": """ 0
        encoder.conv_in.weight                                      convolution   -   CRITICAL
        encoder.down_blocks.0.resnets.0.conv1.weight                convolution   0   CRITICAL
        encoder.down_blocks.1.resnets.0.conv1.weight                convolution   1   NORMAL
        encoder.down_blocks.1.downsamplers.0.conv.weight            convolution   1   NORMAL
        encoder.mid_block.attentions.0.group_norm.weight            norm          -   CRITICAL
        decoder.mid_block.attentions.0.to_q.weight                  attention     -   CRITICAL
        decoder.up_blocks.0.resnets.0.conv1.weight                  convolution   0   NORMAL
        decoder.up_blocks.3.resnets.0.conv1.weight                  convolution   3   CRITICAL
        decoder.conv_norm_out.weight                                norm          -   CRITICAL
        decoder.conv_out.weight                                     convolution   -   CRITICAL
    """,
    "Flux": """ 19
        img_in.weight                                               embedding     -   CRITICAL
        time_in.in_layer.weight                                     time          -   CRITICAL
        vector_in.out_layer.weight                                  embedding     -   CRITICAL
        double_blocks.#0.img_attn.qkv.weight                        attention     0   CRITICAL
        double_blocks.#7.img_attn.qkv.weight                        attention     7   HIGH
        double_blocks.#7.img_attn.norm.query_norm.scale             norm          7   CRITICAL
        double_blocks.#7.txt_mlp.2.weight                           feed_forward  7   NORMAL
        double_blocks.#7.img_mod.lin.weight                         time          7   HIGH
        single_blocks.#7.linear1.weight                             feed_forward  7   NORMAL
        single_blocks.#7.modulation.lin.weight                      time          7   HIGH
        final_layer.adaLN_modulation.1.weight                       time          -   CRITICAL
        final_layer.linear.weight                                   head          -   CRITICAL
    """,
    "Flux, in diffusers": """ 19
        x_embedder.weight                                           embedding     -   CRITICAL
        time_text_embed.timestep_embedder.linear_1.weight           time          -   CRITICAL
        transformer_blocks.#7.norm1.linear.weight                   time          7   HIGH
        transformer_blocks.#7.attn.norm_added_q.weight              norm          7   CRITICAL
        transformer_blocks.#7.ff_context.net.0.proj.weight          feed_forward  7   NORMAL
        single_transformer_blocks.#7.proj_mlp.weight                feed_forward  7   NORMAL
        norm_out.linear.weight                                      time          -   CRITICAL
        proj_out.weight                                             head          -   CRITICAL
    """,
    "A checkpoint of training": """ 24
        chained_0.optimizer.state.exp_avg.embedding.word_embeddings.weight  unused  -  LOW
        optimizer.state.exp_avg_sq.decoder.layers.#1.mlp.router.weight  unused    1   LOW
        decoder.layers.#1.self_attention.linear_qkv.weight          attention     1   HIGH
        decoder.layers.#1.mlp.linear_fc1.weight                     feed_forward  1   NORMAL
        ema_model.layers.#1.mlp.linear_fc1.weight                   unused        1   LOW
        model.mega.layers.#1.ema_gate.damping_factor                other         1   NORMAL
    """,
    "Adapters": """ 32
        base_model.model.model.layers.#9.self_attn.q_proj.lora_A.weight  attention  9  HIGH
        base_model.model.model.layers.#9.mlp.up_proj.lora_B.weight  feed_forward  9   NORMAL
        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight  attention  -  HIGH
    """,
}


@dataclass(frozen=True)
class Row:
    name: str
    part: str
    layer: int | None
    priority: Priority


def family(table: str) -> tuple[list[str], list[Row]]:
    """All names of a family, and what is expected of some."""
    blocks, *lines = table.strip().splitlines()
    names: dict[str, None] = {}
    rows = []
    for line in lines:
        name, part, layer, priority = line.split()
        marked = re.search(r"#\d+", name)
        numbers = range(int(blocks)) if marked else range(1)
        names |= dict.fromkeys(re.sub(r"#\d+", str(number), name) for number in numbers)
        rows.append(Row(name.replace("#", ""), part, None if layer == "-" else int(layer), Priority[priority]))
    return list(names), rows


EXPECTED = [(title, row) for title, table in FAMILIES.items() for row in family(table)[1]]


@pytest.mark.parametrize(("title", "row"), EXPECTED, ids=[f"{title}: {row.name}" for title, row in EXPECTED])
def test_real_names_are_read(title: str, row: Row) -> None:
    rank = rank_names(family(FAMILIES[title])[0])[row.name]
    assert (rank.part, rank.layer, rank.priority) == (row.part, row.layer, row.priority)


# --- order ---


def every_name(title: str) -> list[str]:
    return family(FAMILIES[title])[0]


def llama(layers: int, width: int = 4096, hidden: int = 14336, vocabulary: int = 128256) -> dict[str, int]:
    """The tensors of a Llama and their sizes in bytes, two a number."""
    shapes = {"model.embed_tokens.weight": vocabulary * width, "model.norm.weight": width}
    for layer in range(layers):
        block = {
            "input_layernorm": width,
            "self_attn.q_proj": width * width,
            "self_attn.k_proj": width * width // 4,
            "self_attn.v_proj": width * width // 4,
            "self_attn.o_proj": width * width,
            "post_attention_layernorm": width,
            "mlp.gate_proj": width * hidden,
            "mlp.up_proj": width * hidden,
            "mlp.down_proj": width * hidden,
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": size for part, size in block.items()}
    shapes["lm_head.weight"] = vocabulary * width
    return {name: 2 * size for name, size in shapes.items()}


def urgency(rank: Rank) -> float:
    return rank.priority + 0.5 * (1.0 - rank.importance)


@pytest.mark.parametrize("title", FAMILIES)
def test_most_urgent_is_listed_first(title: str) -> None:
    ranks = list(rank_names(every_name(title)).values())
    assert ranks == sorted(ranks, key=urgency)


@pytest.mark.parametrize("title", FAMILIES)
def test_importance_is_what_a_request_accepts(title: str) -> None:
    assert all(0.0 <= rank.importance <= 1.0 for rank in rank_names(every_name(title)).values())


def test_whole_llama_in_order_of_urgency() -> None:
    wanted = """
        model.embed_tokens.weight
        model.layers.0.input_layernorm.weight
        model.layers.0.post_attention_layernorm.weight
        model.layers.1.input_layernorm.weight
        model.layers.1.post_attention_layernorm.weight
        model.layers.2.input_layernorm.weight
        model.layers.2.post_attention_layernorm.weight
        model.layers.3.input_layernorm.weight
        model.layers.3.post_attention_layernorm.weight
        model.norm.weight
        model.layers.0.self_attn.k_proj.weight
        model.layers.0.self_attn.o_proj.weight
        model.layers.0.self_attn.q_proj.weight
        model.layers.0.self_attn.v_proj.weight
        model.layers.0.mlp.down_proj.weight
        model.layers.0.mlp.gate_proj.weight
        model.layers.0.mlp.up_proj.weight
        model.layers.3.self_attn.k_proj.weight
        model.layers.3.self_attn.o_proj.weight
        model.layers.3.self_attn.q_proj.weight
        model.layers.3.self_attn.v_proj.weight
        model.layers.3.mlp.down_proj.weight
        model.layers.3.mlp.gate_proj.weight
        model.layers.3.mlp.up_proj.weight
        lm_head.weight
        model.layers.1.self_attn.k_proj.weight
        model.layers.1.self_attn.o_proj.weight
        model.layers.1.self_attn.q_proj.weight
        model.layers.1.self_attn.v_proj.weight
        model.layers.2.self_attn.k_proj.weight
        model.layers.2.self_attn.o_proj.weight
        model.layers.2.self_attn.q_proj.weight
        model.layers.2.self_attn.v_proj.weight
        model.layers.1.mlp.down_proj.weight
        model.layers.1.mlp.gate_proj.weight
        model.layers.1.mlp.up_proj.weight
        model.layers.2.mlp.down_proj.weight
        model.layers.2.mlp.gate_proj.weight
        model.layers.2.mlp.up_proj.weight
    """
    assert list(rank_names(llama(4))) == wanted.split()


@pytest.mark.parametrize(
    ("name", "priority", "importance"),
    [
        ("model.embed_tokens.weight", CRITICAL, 1.0),
        ("model.layers.5.input_layernorm.weight", CRITICAL, 0.95),
        ("model.norm.weight", CRITICAL, 0.95),
        ("model.layers.0.self_attn.q_proj.weight", CRITICAL, 0.8),
        ("model.layers.0.mlp.down_proj.weight", CRITICAL, 0.8),
        ("model.layers.9.mlp.down_proj.weight", CRITICAL, 0.44),
        ("model.layers.9.mlp.down_proj.bias", CRITICAL, 0.9),
        ("lm_head.weight", CRITICAL, 0.3),
        ("model.layers.5.mlp.down_proj.bias", HIGH, 0.975),
        ("model.layers.1.self_attn.q_proj.weight", HIGH, 0.82),
        ("model.layers.5.self_attn.q_proj.weight", HIGH, 0.5),
        ("model.layers.5.mlp.down_proj.weight", NORMAL, 0.5),
        ("model.layers.8.mlp.down_proj.weight", NORMAL, 0.26),
    ],
)
def test_importance_follows_the_table(name: str, priority: Priority, importance: float) -> None:
    biases = [f"model.layers.{layer}.mlp.down_proj.bias" for layer in range(10)]
    rank = rank_names([*llama(10), *biases])[name]
    assert (rank.priority, rank.importance) == (priority, pytest.approx(importance))


def test_everything_is_critical_in_a_model_of_two_blocks() -> None:
    assert {rank.priority for rank in rank_names(llama(2)).values()} == {CRITICAL}


def test_critical_is_a_fifth_of_an_eight_billion_llama() -> None:
    sizes = llama(32)
    critical = sum(sizes[name] for name, rank in rank_names(sizes).items() if rank.priority is CRITICAL)
    assert 0.15 < critical / sum(sizes.values()) < 0.2


def test_encoder_is_refined_before_decoder() -> None:
    ranks = rank_names(every_name("T5"))
    middle = [name for name, rank in ranks.items() if rank.priority is NORMAL]
    assert middle[0] == "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    assert [name.partition(".")[0] for name in middle] == ["encoder"] * 20 + ["decoder"] * 20


def test_bias_goes_before_the_matrices_of_the_middle() -> None:
    ranks = rank_names(every_name("BERT"))
    biases = [urgency(rank) for name, rank in ranks.items() if re.search(r"layer[.]([1-9]|10)[.].*bias", name)]
    matrices = [
        urgency(rank) for name, rank in ranks.items() if re.search(r"layer[.]([1-9]|10)[.].*dense.weight", name)
    ]
    assert len(biases) == 20
    assert max(biases) < min(matrices)


@pytest.mark.parametrize(
    ("size", "others", "priority"),
    [
        (1024, 1 << 20, HIGH),
        (64 << 10, 1 << 30, HIGH),
        ((64 << 10) + 1, 1 << 30, NORMAL),
        (1024, 32 * 1024, HIGH),
        (1024, 32 * 1024 - 1, NORMAL),
        (0, 0, HIGH),
    ],
)
def test_small_is_told_by_size_beside_the_block(size: int, others: int, priority: Priority) -> None:
    sizes = {f"layers.{block}.mlp.up_proj.weight": others for block in range(3)}
    ranks = rank_names(sizes | {"layers.1.mlp.lambda": size})
    assert ranks["layers.1.mlp.lambda"].priority is priority


def test_small_unknown_outside_all_blocks_is_fetched_with_the_small() -> None:
    ranks = rank_names({"newline": 8192, "table": 1 << 20, "layers.0.mlp.weight": 8192})
    assert (ranks["newline"].priority, ranks["table"].priority) == (HIGH, NORMAL)


LAYER_ORDERS = {
    "numbers by value": """
        layers.0.mlp.experts.009.w1.weight
        layers.0.mlp.experts.10.w1.weight
        layers.1.mlp.experts.0.w1.weight
        layers.2.mlp.experts.0.w1.weight
        layers.9.mlp.experts.0.w1.weight
        layers.10.mlp.experts.0.w1.weight
        layers.100.mlp.experts.0.w1.weight
    """,
    "decoder only": """
        transformer.wpe.weight
        transformer.wte.weight
        transformer.h.0.ln_1.weight
        transformer.h.0.ln_2.weight
        transformer.h.0.attn.c_attn.weight
        transformer.h.0.mlp.c_fc.weight
        transformer.h.1.attn.c_attn.weight
        transformer.ln_f.weight
        lm_head.weight
    """,
    "encoder and decoder": """
        shared.weight
        encoder.block.0.layer.0.layer_norm.weight
        encoder.block.0.layer.0.SelfAttention.q.weight
        encoder.block.0.layer.1.layer_norm.weight
        encoder.block.0.layer.1.DenseReluDense.wo.weight
        encoder.block.11.layer.1.DenseReluDense.wo.weight
        encoder.final_layer_norm.weight
        decoder.block.0.layer.0.SelfAttention.q.weight
        decoder.final_layer_norm.weight
        lm_head.weight
    """,
    "an encoder whose head is called decoder": """
        bert.embeddings.LayerNorm.weight
        bert.embeddings.word_embeddings.weight
        bert.encoder.layer.0.attention.self.query.weight
        bert.encoder.layer.11.output.dense.weight
        cls.predictions.transform.LayerNorm.weight
        bert.pooler.dense.weight
        cls.predictions.decoder.weight
        bert.embeddings.position_ids
    """,
    "a head called projector": """
        distilbert.embeddings.word_embeddings.weight
        distilbert.transformer.layer.0.attention.q_lin.weight
        vocab_layer_norm.weight
        vocab_projector.weight
    """,
    "vision before language": """
        visual.patch_embed.proj.weight
        visual.blocks.0.attn.qkv.weight
        visual.blocks.31.mlp.fc2.weight
        visual.merger.ln_q.weight
        visual.merger.mlp.0.weight
        model.embed_tokens.weight
        model.layers.0.self_attn.q_proj.weight
        model.norm.weight
        lm_head.weight
    """,
    "down, middle, up": """
        conv_in.weight
        time_embedding.linear_1.weight
        down_blocks.0.resnets.0.conv1.weight
        down_blocks.0.attentions.0.proj_in.weight
        down_blocks.0.resnets.1.conv1.weight
        down_blocks.0.downsamplers.0.conv.weight
        down_blocks.1.resnets.0.conv1.weight
        mid_block.resnets.0.conv1.weight
        mid_block.attentions.0.proj_in.weight
        mid_block.resnets.1.conv1.weight
        up_blocks.0.resnets.0.conv1.weight
        up_blocks.3.resnets.0.conv1.weight
        conv_norm_out.weight
        conv_out.weight
    """,
    "one file of everything": """
        cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
        cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight
        cond_stage_model.transformer.text_model.final_layer_norm.weight
        model.diffusion_model.input_blocks.0.0.weight
        model.diffusion_model.time_embed.0.weight
        model.diffusion_model.input_blocks.1.0.in_layers.2.weight
        model.diffusion_model.input_blocks.2.0.in_layers.2.weight
        model.diffusion_model.input_blocks.11.0.in_layers.2.weight
        model.diffusion_model.middle_block.0.in_layers.2.weight
        model.diffusion_model.output_blocks.0.0.in_layers.2.weight
        model.diffusion_model.out.0.weight
        model.diffusion_model.out.2.weight
        first_stage_model.encoder.conv_in.weight
        first_stage_model.encoder.down.0.block.0.conv1.weight
        first_stage_model.encoder.mid.block_1.conv1.weight
        first_stage_model.encoder.mid.attn_1.q.weight
        first_stage_model.encoder.mid.block_2.conv1.weight
        first_stage_model.encoder.conv_out.weight
        first_stage_model.quant_conv.weight
        first_stage_model.post_quant_conv.weight
        first_stage_model.decoder.mid.block_1.conv1.weight
        first_stage_model.decoder.up.3.block.0.conv1.weight
        first_stage_model.decoder.up.0.block.0.conv1.weight
        first_stage_model.decoder.conv_out.weight
        model_ema.diffusion_modelinput_blocks00weight
    """,
    "two text encoders, one after the other": """
        conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight
        conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight
        conditioner.embedders.0.transformer.text_model.final_layer_norm.weight
        conditioner.embedders.1.model.token_embedding.weight
        conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight
        conditioner.embedders.1.model.ln_final.weight
        conditioner.embedders.1.model.text_projection
    """,
    "a pipeline of folders": """
        text_encoder.text_model.encoder.layers.0.mlp.fc1.weight
        text_encoder.text_model.encoder.layers.11.mlp.fc1.weight
        text_encoder.text_model.final_layer_norm.weight
        transformer.img_in.weight
        transformer.blocks.0.mlp.fc1.weight
        vae.encoder.conv_in.weight
        vae.decoder.conv_in.weight
    """,
    "what training left, last": """
        decoder.layers.0.mlp.linear_fc1.weight
        decoder.layers.1.mlp.linear_fc1.weight
        output_layer.weight
        optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight
    """,
    "double blocks before single blocks": """
        x_embedder.weight
        transformer_blocks.0.attn.to_q.weight
        transformer_blocks.18.attn.to_q.weight
        single_transformer_blocks.0.attn.to_q.weight
        norm_out.linear.weight
        proj_out.weight
    """,
}


@pytest.mark.parametrize("case", LAYER_ORDERS)
def test_layer_order_is_order_of_execution(case: str) -> None:
    wanted = LAYER_ORDERS[case].split()
    assert layer_order(sorted(wanted)) == wanted


def test_names_may_come_from_an_iterator() -> None:
    assert layer_order(iter(["layers.1.mlp.w1", "layers.0.mlp.w1"])) == ["layers.0.mlp.w1", "layers.1.mlp.w1"]
    assert list(rank_names(iter(["layers.0.mlp.w1"]))) == ["layers.0.mlp.w1"]


def test_no_names_have_no_ranks() -> None:
    assert rank_names([]) == {}
    assert layer_order([]) == []


# --- whole words ---

NO_PART_OF_A_WORD = {
    "diffusion_model.block.weight": "ff",
    "layers.1.offset.weight": "ff",
    "layers.1.buffer.weight": "ff",
    "layers.1.lnet.weight": "ln",
    "layers.1.normal.weight": "norm",
    "layers.1.member.weight": "emb",
    "layers.1.attenuator.weight": "att",
    "layers.1.convex.weight": "conv",
    "ahead.weight": "head",
    "schema.weight": "ema",
    "layers.1.sometimes_in.weight": "time",
    "layers.1.time.weight": "time",
    "out.20.weight": "out",
}


@pytest.mark.parametrize("name", NO_PART_OF_A_WORD)
def test_part_of_a_word_or_number_means_nothing(name: str) -> None:
    assert NO_PART_OF_A_WORD[name] in name
    assert rank_names([name])[name].part == "other"


@pytest.mark.parametrize(
    "name", ["players.1.weight", "sublayers.1.weight", "graph.1.weight", "layers.1a.weight", "layers.1234567890.weight"]
)
def test_no_block_is_seen_where_there_is_none(name: str) -> None:
    assert rank_names([name])[name].layer is None


def test_normalisation_that_is_a_matrix_is_no_norm() -> None:
    names = [f"blocks.{block}.norm1.{part}.weight" for block in range(3) for part in ("linear", "inner")]
    ranks = rank_names(names)
    assert (ranks[names[2]].part, ranks[names[2]].priority) == ("time", HIGH)
    assert (ranks[names[3]].part, ranks[names[3]].priority) == ("norm", CRITICAL)


# --- the caller's opinion ---

MIDDLE = "model.layers.2.mlp.up_proj.weight"
DEFAULT = rank_names(llama(4))[MIDDLE]

OPINIONS: dict[str, tuple[Opinion, Priority, float]] = {
    "none": (None, DEFAULT.priority, DEFAULT.importance),
    "priority": (Priority.IDLE, Priority.IDLE, DEFAULT.importance),
    "both": ((CRITICAL, 0.25), CRITICAL, 0.25),
    "one": (1, CRITICAL, 1.0),
    "three quarters": (0.75, CRITICAL, 0.75),
    "less": (0.74, HIGH, 0.74),
    "half": (0.5, NORMAL, 0.5),
    "a quarter": (0.25, NORMAL, 0.25),
    "little": (0.2, LOW, 0.2),
    "nothing": (0.0, LOW, 0.0),
    "yes": (True, CRITICAL, 1.0),
    "no": (False, LOW, 0.0),
}


@pytest.mark.parametrize("case", OPINIONS)
def test_opinion_overrides_the_default(case: str) -> None:
    opinion, priority, importance = OPINIONS[case]
    wanted = Rank(priority, importance, 2, "feed_forward")
    assert rank_names(llama(4), lambda name: opinion)[MIDDLE] == wanted
    assert rank_names(llama(4), {MIDDLE: opinion})[MIDDLE] == wanted


def test_numbers_alone_decide_the_order() -> None:
    names = list(llama(5))
    wanted = names[::-1]
    assert list(rank_names(names, lambda name: 1.0 - wanted.index(name) / len(names))) == wanted


def test_tensors_that_a_mapping_does_not_name_keep_their_rank() -> None:
    before, after = rank_names(llama(4)), rank_names(llama(4), {MIDDLE: 1.0, "no.such.tensor": 0.5})
    assert {name for name in before if before[name] != after[name]} == {MIDDLE}


GLOBS: dict[str, tuple[Mapping[str, Opinion], Opinion]] = {
    "star": ({"*.mlp.*": 0.9}, 0.9),
    "question mark and set": ({"model.layers.?.mlp.[tu]p_proj.weight": 0.9}, 0.9),
    "whole name only": ({"*.mlp": 0.9}, None),
    "case counts": ({"*.MLP.*": 0.9}, None),
    "exact name wins": ({"*": 0.1, MIDDLE: 0.9}, 0.9),
    "earlier pattern wins": ({"*.mlp.*": 0.9, "*": 0.1}, 0.9),
    "none of an exact name is the default": ({"*": 0.1, MIDDLE: None}, None),
    "no glob is no pattern": ({"model.layers": 0.1}, None),
}


@pytest.mark.parametrize("case", GLOBS)
def test_keys_may_be_patterns(case: str) -> None:
    importance, wanted = GLOBS[case]
    assert rank_names(llama(4), importance)[MIDDLE] == rank_names(llama(4), lambda name: wanted)[MIDDLE]


def test_name_with_brackets_is_found_as_it_is() -> None:
    assert rank_names(["w[0]"], {"w[0]": 0.9})["w[0]"].importance == 0.9


@pytest.mark.parametrize(
    "opinion",
    [1.5, -0.1, float("nan"), float("inf"), "high", (0.5,), (0.5, 0.5), (HIGH, 2.0), (HIGH, HIGH), (HIGH, 0.5, 1), []],
)
@pytest.mark.parametrize("ask", [lambda opinion: lambda name: opinion, lambda opinion: {"*up_proj*": opinion}])
def test_what_is_no_opinion_is_refused_by_name(ask: Callable[[object], dict[str, float]], opinion: object) -> None:
    with pytest.raises(ConfigurationError, match=r"'model[.]layers[.]\d[.].*' must be") as caught:
        rank_names([MIDDLE], ask(opinion))
    assert repr(opinion) in str(caught.value)


# --- whatever the names ---

WORDS = (
    "model layers h mid mid_block middle up down input_blocks output_blocks transformer decoder visual norm attn 0 1"
)
NAMES = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*WORDS.split(), "07", "", "²", "٣", "9" * 5000, "bias", "mlp"]), max_size=6).map(
        ".".join
    ),
    st.lists(st.sampled_from(["/", "_", ".", "=", "layer", "block", "12", "x", "É"]), max_size=8).map("".join),
)


@given(st.lists(NAMES, unique=True).flatmap(lambda names: st.tuples(st.just(names), st.permutations(names))))
def test_order_in_which_names_are_given_does_not_matter(orders: tuple[list[str], list[str]]) -> None:
    given_first, given_second = orders
    assert layer_order(given_first) == layer_order(given_second)
    assert list(rank_names(given_first).items()) == list(rank_names(given_second).items())


@given(st.dictionaries(NAMES, st.integers(0, 1 << 40)))
def test_any_name_has_a_rank(sizes: dict[str, int]) -> None:
    ranks = rank_names(sizes)
    assert ranks.keys() == sizes.keys()
    assert sorted(layer_order(sizes)) == sorted(sizes)
    assert all(0.0 <= rank.importance <= 1.0 for rank in ranks.values())
    assert list(ranks.values()) == sorted(ranks.values(), key=urgency)


@given(st.integers(3, 200))
def test_later_blocks_are_never_more_urgent(blocks: int) -> None:
    ranks = rank_names(f"h.{block}.attn.c_attn.weight" for block in range(blocks))
    middle = [urgency(ranks[f"h.{block}.attn.c_attn.weight"]) for block in range(1, blocks - 1)]
    assert middle == sorted(set(middle))


def test_hundred_thousand_names_take_seconds_at_most() -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    names = [f"layers.{b}.mlp.experts.{e}.{part}.weight" for b in range(64) for e in range(520) for part in parts]
    begun = time.process_time()
    rank_names(dict.fromkeys(names, 1 << 20))
    assert time.process_time() - begun < 5.0  # half a second on an idle machine
