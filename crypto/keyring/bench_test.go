package keyring_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
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

func benchSealer(b *testing.B) (*rule.Sealer, *keyring.Ring) {
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		b.Fatal(err)
	}
	r, err := keyring.New(keyring.RingConfig{Provider: "ack", KMS: &plainKMS{}, Cache: cache, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done })
	s, err := rule.New(rule.Config{Write: r})
	if err != nil {
		b.Fatal(err)
	}
	return s, r
}

// lostKMS has lost its key.
type lostKMS struct{ plainKMS }

func (k *lostKMS) Decrypt(context.Context, string, *service.DecryptRequest) ([]byte, error) {
	return nil, ringtest.GoneError("Decrypt")
}

func (k *lostKMS) Status(context.Context) (*service.StatusResponse, error) {
	return nil, ringtest.GoneError("Status")
}

// benchRule is a rule whose seeds are copied by another KMS.
func benchRule(b *testing.B, kms, copies kmsclient.Service) *rule.Sealer {
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		b.Fatal(err)
	}
	var rings []*keyring.Ring
	for name, k := range map[string]kmsclient.Service{"ack": kms, "dr": copies} {
		r, err := keyring.New(keyring.RingConfig{Provider: name, KMS: k, Cache: cache, ReadOnly: name == "dr", Logger: ringtest.Quiet})
		if err != nil {
			b.Fatal(err)
		}
		rings = append(rings, r)
	}
	slices.SortFunc(rings, func(a, b *keyring.Ring) int { return strings.Compare(a.Provider(), b.Provider()) })
	if err := rings[0].SetRecovery(rings[1:], false); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, r := range rings {
		running.Go(func() { _ = r.Run(ctx) })
	}
	b.Cleanup(func() { cancel(); running.Wait() })
	s, err := rule.New(rule.Config{Write: rings[0], Recovery: rings[1:]})
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func BenchmarkSeal(b *testing.B) {
	s, _ := benchSealer(b)
	ctx, key, value := context.Background(), []byte("/registry/secrets/default/s1"), make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Seal(ctx, key, value); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	s, _ := benchSealer(b)
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
			if _, err := s.Open(ctx, nil, key, message); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			message := make([]byte, len(stored))
			for pb.Next() {
				copy(message, stored)
				if _, err := s.Open(ctx, nil, key, message); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkOpenRecovered is the price of reading on when the key is lost; BenchmarkOpen is that of
// every other day.
func BenchmarkOpenRecovered(b *testing.B) {
	dr := &plainKMS{}
	s := benchRule(b, &plainKMS{}, dr)
	ctx, key := context.Background(), []byte("/registry/secrets/default/s1")
	stored, err := s.Seal(ctx, key, make([]byte, 1024))
	if err != nil {
		b.Fatal(err)
	}
	lost := benchRule(b, &lostKMS{}, dr)
	b.ReportAllocs()
	message := bytes.Clone(stored)
	for b.Loop() {
		copy(message, stored)
		if _, err := lost.Open(ctx, nil, key, message); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSeedHit is the way from a stored value to its unwrapped seed, without opening it: what
// every read pays for the cache.
func BenchmarkSeedHit(b *testing.B) {
	s, r := benchSealer(b)
	ctx, key := context.Background(), []byte("/registry/secrets/default/s1")
	stored, err := s.Seal(ctx, key, make([]byte, 1024))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := s.Open(ctx, nil, key, bytes.Clone(stored)); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, object, _ := envelope.Split(stored); !r.HasHot(object) {
				b.Error("the seed is not at hand")
				return
			}
		}
	})
}
