# The environment of everything that launch/ starts: `source launch/environment.sh`.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$_root/.venv/bin:$PATH"
export DIST_TRAIN_WEIGHTS="$_root/.venv/share/dist_train" # the demo's encoders, as plain folders
export HF_HUB_OFFLINE=1                                   # so that no other is downloaded
export TOKENIZERS_PARALLELISM=false
# DeepSpeed compiles its kernels at first use; a folder of our own keeps them beside the library.
export TORCH_EXTENSIONS_DIR="$_root/.venv/share/torch_extensions"
unset _root
