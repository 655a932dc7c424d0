"""CTC in your own training loop: both stages on scikit-learn's handwritten digits, with plain torch and timm."""

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import ctc_timm

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1)  # [N, 3, 8, 8]
labels = torch.tensor(digits.target)  # [N]
train = TensorDataset(images[:1400], labels[:1400], torch.arange(1400))  # the third is each image's index
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

model = timm.create_model('cifar_resnet20', num_classes=10)
task = ctc_timm.CTCTask(model, labels=labels[:1400], num_negatives=512, temporal_weight=0.1)
optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)

for epoch in range(9):
    if epoch == 6:  # freeze a copy of the model, the information bank, and contrast with it from here on
        task.start_temporal_stage(DataLoader(train, batch_size=64))
    task.train()
    for batch, targets, index in loader:
        losses = task(batch, targets, index)
        optimizer.zero_grad()
        losses['loss'].backward()
        optimizer.step()
    print(f'epoch {epoch}, {task.stage} stage: loss {losses["loss"]:.3f}')

with torch.no_grad():
    predicted = model.eval()(images[1400:]).argmax(dim=1)
print(f'accuracy on the other {len(predicted)} digits: {100 * (predicted == labels[1400:]).float().mean():.1f}%')
