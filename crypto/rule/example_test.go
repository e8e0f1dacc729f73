package rule_test

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// A rule encrypts with the DEK seed of a ring. A value that needs no KMS call is decrypted without
// waiting.
func Example() {
	cache, _ := keyring.NewCache(keyring.CacheConfig{})
	ring, err := keyring.New(keyring.RingConfig{
		Provider: "main", KMS: kmstest.NewMemory(), Cache: cache, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	sealer, _ := rule.New(rule.Config{Prefix: "/registry/", Write: ring})

	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		_ = ring.Run(ctx)
	}()
	key := []byte("/registry/secrets/a/b")
	stored, err := sealer.Seal(ctx, key, []byte("value")) // waits for the first health check
	fmt.Println(sealer.Sealed(stored), err)
	value, err := sealer.TryOpen(nil, key, stored)
	fmt.Printf("%s %v\n", value, err)
	cancel()
	<-stopped
	// Output:
	// true <nil>
	// value <nil>
}
