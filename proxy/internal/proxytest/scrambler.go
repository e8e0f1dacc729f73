package proxytest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/bits"
	"slices"
	"sync/atomic"
)

// scrambler is a Sealer that never seals one value twice the same, so that stored bytes neither
// compare nor sort as their values do.
type scrambler struct {
	mark  byte
	count *atomic.Uint32
}

// scrambled is the size of what precedes the value: the mark, the number of the call, and a
// checksum of number, key and value.
const scrambled = 1 + 4 + 4

func (s scrambler) Seal(_ context.Context, dst, key, value []byte) ([]byte, error) {
	out := binary.BigEndian.AppendUint32([]byte{s.mark}, bits.Reverse32(s.count.Add(1)))
	out = binary.BigEndian.AppendUint32(out, s.sum(out[1:5], key, value))
	return append(append(dst, out...), s.mixed(out[1:5], value)...), nil
}

func (s scrambler) Open(_ context.Context, dst, key, stored []byte) ([]byte, error) {
	if len(stored) < scrambled || stored[0] != s.mark {
		return nil, errors.New("not what Seal wrote")
	}
	value := s.mixed(stored[1:5], stored[scrambled:])
	if s.sum(stored[1:5], key, value) != binary.BigEndian.Uint32(stored[5:]) {
		return nil, errors.New("not what Seal wrote for this key")
	}
	return append(dst, value...), nil
}

func (s scrambler) TrySeal(dst, key, value []byte) ([]byte, error) {
	return s.Seal(context.Background(), dst, key, value)
}

func (s scrambler) TryOpen(dst, key, stored []byte) ([]byte, error) {
	return s.Open(context.Background(), dst, key, stored)
}

func (s scrambler) sum(number, key, value []byte) uint32 {
	return crc32.ChecksumIEEE(slices.Concat(number, key, []byte{s.mark}, value))
}

func (scrambler) mixed(number, value []byte) []byte {
	out := bytes.Clone(value)
	for i := range out {
		out[i] ^= number[i%4] + byte(i) + 0x5b
	}
	return out
}

// NewScramblers makes two that count together.
func NewScramblers() (first, second scrambler) {
	count := new(atomic.Uint32)
	return scrambler{0xf1, count}, scrambler{0x00, count}
}
