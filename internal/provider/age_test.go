package provider

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	fage "filippo.io/age"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/age"
)

// keyPair returns an identity of age and its recipient.
func keyPair(t *testing.T) (identity, recipient string) {
	t.Helper()
	k, err := fage.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return k.String(), k.Recipient().String()
}

func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "recipients.txt")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestAgeProblems gives each bad block its problem, at the field that has it, with a hint, and
// without quoting a private key.
func TestAgeProblems(t *testing.T) {
	identity, one := keyPair(t)
	_, two := keyPair(t)
	k, err := fage.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	hybrid := k.Recipient().String()
	const yubikey = "age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t"
	for name, test := range map[string]struct {
		block config.Age
		path  string
		text  string
	}{
		"identity":               {config.Age{Recipients: []string{one, identity}}, "age.recipients[1]", "identity, which is secret"},
		"mixed":                  {config.Age{Recipients: []string{one, hybrid}}, "age", "cannot be used together"},
		"mixed with the file":    {config.Age{Recipients: []string{one}, RecipientsFile: file(t, hybrid)}, "age", "cannot be used together"},
		"plugin":                 {config.Age{Recipients: []string{yubikey}}, "age.recipients[0]", "age-plugin-yubikey"},
		"empty":                  {config.Age{Recipients: []string{""}}, "age.recipients[0]", "begins with age1"},
		"twice":                  {config.Age{Recipients: []string{one, two, one}}, "age.recipients[2]", "same as recipient 0"},
		"twice, in the file":     {config.Age{Recipients: []string{one}, RecipientsFile: file(t, two+"\n"+one)}, "age.recipientsFile", "its recipient 2 is there twice"},
		"identity in the file":   {config.Age{RecipientsFile: file(t, "# mine\n"+identity)}, "age.recipientsFile", "line 2 is an identity"},
		"empty file":             {config.Age{Recipients: []string{one}, RecipientsFile: file(t, "# nobody\n")}, "age.recipientsFile", "has no recipient"},
		"no file":                {config.Age{RecipientsFile: "/nowhere/recipients.txt"}, "age.recipientsFile", "no such file"},
		"a folder for a file":    {config.Age{RecipientsFile: t.TempDir()}, "age.recipientsFile", "not a regular file"},
		"a file that is too big": {config.Age{RecipientsFile: file(t, strings.Repeat("#\n", maxRecipientsFile))}, "age.recipientsFile", "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			ps := Check(config.KMS{Name: "off", Age: &test.block})
			if len(ps) != 1 || ps[0].Path != test.path || !strings.Contains(ps[0].Text, test.text) || ps[0].Hint == "" {
				t.Fatalf("%+v", ps)
			}
			if strings.Contains(problem.List(ps).Error(), identity) {
				t.Error("the problem quotes a private key")
			}
		})
	}
}

// TestAgeReload uses the recipients of a changed file, and keeps the old ones if it is bad.
func TestAgeReload(t *testing.T) {
	_, one := keyPair(t)
	_, two := keyPair(t)
	identity, three := keyPair(t)
	name := file(t, two)
	p, err := New(config.KMS{Name: "off", Age: &config.Age{Recipients: []string{one}, RecipientsFile: name}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	key, before := p.Offline, p.Offline.ID()
	if err := os.WriteFile(name, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := key.Reload(); err == nil || key.ID() != before {
		t.Errorf("a bad file: %v", err)
	}
	if err := os.WriteFile(name, []byte(three), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := key.Reload(); err != nil || key.ID() == before {
		t.Errorf("a good file: %v, %s", err, key.ID())
	}
	if tested, err := key.Test(); tested || err != nil || key.CanUnwrap() {
		t.Errorf("without an identity: %v, %v", tested, err)
	}
	ids, err := age.ReadIdentities(file(t, identity), age.Prompter{})
	if err != nil {
		t.Fatal(err)
	}
	key.SetIdentities(ids)
	if tested, err := key.Test(); !tested || err != nil {
		t.Errorf("with an identity: %v, %v", tested, err)
	}
	seed := bytes.Repeat([]byte("s"), age.SeedSize)
	wrapped, id, err := key.Wrap(seed)
	if err != nil || id != key.ID() {
		t.Fatalf("%s, %v", id, err)
	}
	if got, err := key.Unwrap(wrapped); err != nil || !bytes.Equal(got, seed) {
		t.Errorf("unwrap: %v", err)
	}
}
