package clitest

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"testing"
)

// TestTelling: the search that ends this package's tests finds what it is for.
func TestTelling(t *testing.T) {
	path := NewDir(t).Path("key.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var own Telling
	own.KeyFile(t, path)
	if len(own.secrets) != 1 {
		t.Fatalf("%d keys in a new key file", len(own.secrets))
	}
	own.Output([]byte("harmless"))
	if what := own.Leak(); what != "" {
		t.Errorf("found %s", what)
	}
	own.Output(text)
	if own.Leak() == "" {
		t.Error("a printed key file was not found")
	}
	for how, tell := range map[string]func(*Telling, []byte){
		"an error": func(own *Telling, b []byte) { _ = own.Error(fmt.Errorf("seed %x is lost", b)) },
		"a log":    func(own *Telling, b []byte) { slog.New(slog.NewTextHandler(own, nil)).Info("generated", "seed", b) },
	} {
		var own Telling
		seed := bytes.Repeat([]byte("seed"), 8)
		own.Secret("a seed", seed)
		tell(&own, []byte("another one that is no secret..."))
		if what := own.Leak(); what != "" {
			t.Errorf("found %s in %s", what, how)
		}
		if tell(&own, seed); own.Leak() == "" {
			t.Errorf("a seed in %s was not found", how)
		}
	}
}
