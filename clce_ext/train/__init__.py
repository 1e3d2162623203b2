"""Fine-tuning image models with the losses of this package: ``clce-train``, ``clce-eval``, ``clce-compare``.

The modules, from the outside in:

    cli          clce-train: options and recipes -> TrainConfig -> loop.train
    evaluate     clce-eval: a finished run -> kNN, few-shot episodes, embedding quality
    predict      clce-predict: a saved model -> the classes of new images, a page of thumbnails
    compare      clce-compare: objectives x seeds -> one report
    loop         the run: stages, epochs, checkpoints, resuming
    trainer      one stage's updates: batches, optimizer, schedule, gradients
    choice       the best epoch, and when to stop
    judge        a model's outputs for a split, and what they are worth
    results      the figures of finished runs, for reports and tables
    report       what templates/report.html says in figures and tables, with the pictures of plots
    start        what a run says when it starts, or with --plan would do; the versions of what runs
    stages       what a run does first and next, and what it minimises
    criteria     what a stage minimises, with its halves for the records
    losses       sums of an epoch's losses, on the device; those that are not finite
    models       timm's models with a projection head; the small BEiT for digits
    data         data sets, few-shot subsets, class-balanced batches, augmentations
    metrics      accuracy, neighbours, few-shot episodes, geometry of the embeddings
    checkpoint   atomic writing, reading with clear errors
    records      metrics.csv, TensorBoard, progress bar
    processes    one process, or those that torchrun started
    run_folder   one command at a time in a run's directory; what it goes on with
    seeds        random numbers as functions of a key
    config       every option once: command line, recipe file, config.yaml
    objectives   ce, supcon, lacvit, schane, clce: one record each
"""

from .errors import TrainingError

__all__ = ["TrainingError"]
