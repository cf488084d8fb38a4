"""TxFM: tokens, encoder, decoder and gene head in one module, with the vocabulary it was made for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import CommitInfo, ModelHubMixin
from torch import Tensor, nn

from txfm_data.matching import Duplicates, NonInteger
from txfm_data.vocabulary import GeneStatistics, Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.decoder import Decoder, GeneHead
from txfm_model.encoder import Encoder
from txfm_model.initialise import initialise
from txfm_model.prediction import Prediction
from txfm_model.stochastic_depth import BranchScales
from txfm_model.tokens import GeneTokens


class TxFM(nn.Module, ModelHubMixin, library_name="txfm", tags=["rna-seq", "single-cell", "masked-autoencoder"]):
    """Masked autoencoder of RNA-seq counts.

    Parameters
    ----------
    config
        Shape of the network.
    vocabulary
        Genes it knows; row number is token id.

    Attributes
    ----------
    statistics : GeneStatistics | None
        Per-gene statistics of the training corpus, where it has one.
    provenance : dict
        Where the weights come from: corpus fingerprint, commit, versions, training configuration, results.
        Plain values; empty for a model that was not trained.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if len(vocabulary) == 0:
            raise ValueError("the vocabulary has no genes; a model needs at least one")
        self.config = config
        self.vocabulary = vocabulary
        self.statistics: GeneStatistics | None = None
        self.provenance: dict[str, Any] = {}
        self.tokens = GeneTokens(len(vocabulary), config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = GeneHead(len(vocabulary), config)
        initialise(self)

    def encode(
        self,
        gene_ids_BK: Tensor,
        values_BK: Tensor,
        n_unmasked_B: Tensor | None = None,
        *,
        branch_scale_RB: BranchScales | None = None,
        layer: int | str | None = None,
    ) -> Tensor:
        """Embed samples: CLS after the final norm, (B, D) float32, or the state after another layer.

        Parameters
        ----------
        gene_ids_BK
            (B, K) int64. Token ids of the genes shown.
        values_BK
            (B, K) float32. ln(1 + L c / library size) of those genes.
        n_unmasked_B
            (B,) integer. Columns at or past it are padding. Leave it out where no sample is padded: attention
            is faster without a mask.
        branch_scale_RB
            (2 x blocks, B) float32. What the branches of each sample are multiplied by, as `branch_scales` gives
            it for stochastic depth. None draws from torch's generator in training mode, and is 1 in evaluation.
        layer
            None or "final": CLS after the final norm. 0 to `blocks`: CLS after so many blocks of the encoder, not
            normed (0 is the CLS parameter, the same for all). `blocks` + i: the state after block i of the decoder.

        Raises
        ------
        ValueError
            If the model has no such layer.
        """
        n_blocks, n_states = self.config.blocks, self.config.blocks + self.config.decoder_blocks
        if layer not in (None, "final") and not (isinstance(layer, int) and 0 <= layer <= n_states):
            raise ValueError(
                f"layer: {layer!r} is none of this model; take 0 (the CLS parameter) to {n_blocks} for its encoder, "
                f'{n_blocks + 1} to {n_states} for its decoder, or "final"'
            )
        tokens_BKD = self.tokens(gene_ids_BK, values_BK)
        if isinstance(layer, int) and layer <= n_blocks:
            return self.encoder.cls_after(layer, tokens_BKD, n_unmasked_B, branch_scale_RB).float()
        cls_BD: Tensor = self.encoder(tokens_BKD, n_unmasked_B, branch_scale_RB)
        if not isinstance(layer, int):
            return cls_BD
        with torch.autocast(cls_BD.device.type, enabled=False):
            state_BD: Tensor = self.decoder(cls_BD, layer - n_blocks)
        return state_BD

    def decode(self, cls_BD: Tensor, *, measured_BG: Tensor | None = None) -> Prediction:
        """Predict every gene from CLS after the final norm, (B, D) float32.

        In float32 also under autocast: a small share of the work, not of the rounding.
        """
        with torch.autocast(cls_BD.device.type, enabled=False):
            prediction: Prediction = self.head(self.decoder(cls_BD), cls_BD, measured_BG)
        return prediction

    def forward(
        self,
        gene_ids_BK: Tensor,
        values_BK: Tensor,
        n_unmasked_B: Tensor | None = None,
        *,
        measured_BG: Tensor | None = None,
        branch_scale_RB: BranchScales | None = None,
    ) -> Prediction:
        """Predict the log1p value of every gene, (B, G) float32; arguments as in `encode`.

        `measured_BG`, (B, G) bool, says which genes share the counts under the activation softmax; the others do not
        read it. None is all genes.
        """
        cls_BD = self.encode(gene_ids_BK, values_BK, n_unmasked_B, branch_scale_RB=branch_scale_RB)
        return self.decode(cls_BD, measured_BG=measured_BG)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Whether to compute each block again in the backward pass in place of keeping its states: less memory, more work."""
        self.encoder.checkpoints_activations = on

    def embed(
        self,
        adata: Any,
        *,
        counts_layer: str | None = None,
        layer: int | Literal["final"] = "final",
        gene_ids: str | None = None,
        symbols: str | None = None,
        library_size: str | None = None,
        duplicates: Duplicates = "error",
        non_integer: NonInteger = "error",
        n_unmasked: int | None = None,
        views: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 32,
        precision: Literal["auto", "bf16", "no"] = "no",
        dtype: Literal["float32", "float16"] = "float32",
    ) -> np.ndarray:
        """Embed the raw counts of an AnnData object, (n_obs, D); see `txfm_model.embed.embed_anndata`."""
        from txfm_model.embed import embed_anndata

        return embed_anndata(
            self, adata, counts_layer=counts_layer, layer=layer, gene_ids=gene_ids, symbols=symbols, library_size=library_size,
            duplicates=duplicates, non_integer=non_integer, n_unmasked=n_unmasked, views=views, seed=seed, temperature=temperature,
            batch_size=batch_size, precision=precision, dtype=dtype,
        )  # fmt: skip

    def impute(
        self,
        adata: Any,
        genes: Sequence[str],
        *,
        counts_layer: str | None = None,
        gene_ids: str | None = None,
        symbols: str | None = None,
        library_size: str | None = None,
        duplicates: Duplicates = "error",
        non_integer: NonInteger = "error",
        n_unmasked: int | None = None,
        views: int = 1,
        seed: int = 0,
        temperature: float = 0.0,
        batch_size: int = 32,
        precision: Literal["auto", "bf16", "no"] = "no",
        dtype: Literal["float32", "float16"] = "float32",
    ) -> Any:
        """Predict genes, measured or not, for an AnnData object: a new one; see `txfm_model.impute.impute_anndata`."""
        from txfm_model.impute import impute_anndata

        return impute_anndata(
            self, adata, genes, counts_layer=counts_layer, gene_ids=gene_ids, symbols=symbols, library_size=library_size,
            duplicates=duplicates, non_integer=non_integer, n_unmasked=n_unmasked, views=views, seed=seed, temperature=temperature,
            batch_size=batch_size, precision=precision, dtype=dtype,
        )  # fmt: skip

    def genes(self, out: str | Path) -> dict[str, Any]:
        """Write the two vectors of each gene as parquet; see `txfm_model.genes.export_genes`."""
        from txfm_model.genes import export_genes

        return export_genes(self, out)

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> "TxFM":
        """Open a checkpoint: its folder, the folder of its run, or the id of a model on the Hugging Face Hub.

        On the Hub, pin `revision` to a commit. (The mixin's own method reads config.json before anything is
        checked and would fill `__init__` from it, so this goes to `_from_pretrained` straight.)

        Raises
        ------
        ValueError
            If the checkpoint is damaged, of an unknown format, or its vocabulary is not that of its training.
        FileNotFoundError
            If there is no such folder.
        """
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
    ) -> "TxFM":
        from txfm_model import checkpoint  # it builds this class

        folder = checkpoint.locate_checkpoint(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return checkpoint.load_checkpoint(folder)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Add TxFM checkpoint",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        ignore_patterns: list[str] | None = None,
    ) -> CommitInfo:
        """Publish this model on the Hugging Face Hub, as the checkpoint that `from_pretrained` opens there.

        Parameters
        ----------
        repo_id
            "organisation/name"; made if it is not there.
        commit_message
            Of the one commit that brings all files.
        private
            Whether a new repository is private; None follows the organisation, and is public where it says nothing.
        token
            Where none is given, that of the environment (HF_TOKEN) or of `hf auth login`.
        branch
            To commit to, "main" if not given; made if it is not there.
        create_pr
            Open a pull request instead.
        ignore_patterns
            Files not to send: ["README.md"] keeps a card that was edited on the Hub.

        Returns
        -------
        CommitInfo
            Its `oid` is the revision to pin in `from_pretrained`.

        Raises
        ------
        ValueError
            If weights are NaN or infinite; nothing is uploaded.
        OSError
            If the Hub refuses or the upload breaks off; what was there is unchanged.
        """
        from txfm_model.hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            ignore_patterns=ignore_patterns,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        from txfm_model import checkpoint

        checkpoint.save_into(self, Path(save_directory))
