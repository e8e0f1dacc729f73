package keyring

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"k8s.io/kms/pkg/service"
)

// plainKMS is as little of a KMS as a ring needs; it costs nothing.
type plainKMS struct{ seed []byte }

func (k *plainKMS) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	k.seed = append([]byte(nil), data...)
	return &service.EncryptResponse{Ciphertext: make([]byte, 150), KeyID: "key-1/version-1"}, nil
}

func (k *plainKMS) Decrypt(context.Context, string, *service.DecryptRequest) ([]byte, error) {
	return append([]byte(nil), k.seed...), nil
}

func (k *plainKMS) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "key-1/version-1"}, nil
}

func benchSealer(b *testing.B) *Sealer {
	cache, err := NewCache(CacheConfig{})
	if err != nil {
		b.Fatal(err)
	}
	r, err := New(RingConfig{Provider: "ack", KMS: &plainKMS{}, Cache: cache, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done })
	s, err := NewSealer(SealerConfig{Write: r})
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func BenchmarkSeal(b *testing.B) {
	s := benchSealer(b)
	ctx, key, value := context.Background(), []byte("/registry/secrets/default/s1"), make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Seal(ctx, key, value); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	s := benchSealer(b)
	ctx, key := context.Background(), []byte("/registry/secrets/default/s1")
	stored, err := s.Seal(ctx, key, make([]byte, 1024))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		message := make([]byte, len(stored))
		for b.Loop() {
			copy(message, stored) // it is opened where it stands
			if _, err := s.Open(ctx, key, message); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			message := make([]byte, len(stored))
			for pb.Next() {
				copy(message, stored)
				if _, err := s.Open(ctx, key, message); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}
