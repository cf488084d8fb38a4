"""TxFM: tokens, encoder, decoder and gene head in one module, with the vocabulary it was made for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from txfm_data.matching import Duplicates
from txfm_data.vocabulary import GeneStatistics, Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.decoder import Decoder, GeneHead
from txfm_model.encoder import Encoder
from txfm_model.initialise import initialise
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

    def encode(self, gene_ids_BK: Tensor, values_BK: Tensor, n_unmasked_B: Tensor | None = None) -> Tensor:
        """Embed samples: CLS after the final norm, (B, D) float32.

        Parameters
        ----------
        gene_ids_BK
            (B, K) int64. Token ids of the genes shown.
        values_BK
            (B, K) float32. ln(1 + L c / library size) of those genes.
        n_unmasked_B
            (B,) integer. Columns at or past it are padding. Leave it out where no sample is padded: attention
            is faster without a mask.
        """
        cls_BD: Tensor = self.encoder(self.tokens(gene_ids_BK, values_BK), n_unmasked_B)
        return cls_BD

    def forward(self, gene_ids_BK: Tensor, values_BK: Tensor, n_unmasked_B: Tensor | None = None) -> Tensor:
        """Predict the log1p value of every gene, (B, G) float32; arguments as in `encode`.

        Decoder and head run in float32 also under autocast: a small share of the work, not of the rounding.
        """
        cls_BD = self.encode(gene_ids_BK, values_BK, n_unmasked_B)
        with torch.autocast(cls_BD.device.type, enabled=False):
            predicted_BG: Tensor = self.head(self.decoder(cls_BD))
        return predicted_BG

    def embed(
        self,
        adata: Any,
        *,
        layer: str | None = None,
        gene_ids: str | None = None,
        symbols: str | None = None,
        library_size: str | None = None,
        duplicates: Duplicates = "error",
        batch_size: int = 32,
        n_unmasked: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Embed the raw counts of an AnnData object, (n_obs, D) float32; see `txfm_model.embed.embed_anndata`."""
        from txfm_model.embed import embed_anndata

        return embed_anndata(
            self,
            adata,
            layer=layer,
            gene_ids=gene_ids,
            symbols=symbols,
            library_size=library_size,
            duplicates=duplicates,
            batch_size=batch_size,
            n_unmasked=n_unmasked,
            seed=seed,
        )

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

    def _save_pretrained(self, save_directory: Path) -> None:
        from txfm_model import checkpoint

        checkpoint.save_into(self, Path(save_directory))
