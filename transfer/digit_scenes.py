#!/usr/bin/env python3
"""Write scenes of handwritten digits with boxes and masks, in the folders of COCO, VOC and ADE.

python transfer/digit_scenes.py SCENES                                    # COCO and VOC, in one folder
python transfer/digit_scenes.py SCENES --layouts ade --img-size 128 --train-images 2000
"""

from __future__ import annotations

from ctc_timm.cli.arguments import Parser, non_negative_int, parse, positive_int, run_script, whole_number
from ctc_timm.dense import scenes


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    parser.add_argument('output', metavar='OUT', help='folder to write, which must not exist or be empty')
    parser.add_argument('--train-images', type=positive_int, default=scenes.TRAIN_IMAGES, metavar='N', help='scenes')
    parser.add_argument('--val-images', type=positive_int, default=scenes.VAL_IMAGES, metavar='M', help='scenes')
    parser.add_argument(
        '--img-size', type=whole_number(32, 2048), default=scenes.IMG_SIZE, metavar='S', help='sides in pixels'
    )
    parser.add_argument('--seed', type=non_negative_int, default=0, metavar='K', help='of everything random')
    parser.add_argument('--layouts', nargs='+', choices=scenes.LAYOUTS, default=['coco', 'voc'], help='what to write')
    args = parse(parser)
    folder = scenes.write_scenes(
        args.output, args.train_images, args.val_images, args.img_size, args.seed, args.layouts
    )
    print(f'{args.train_images:,} training and {args.val_images:,} validation scenes in {folder}')


if __name__ == '__main__':
    run_script(main)
