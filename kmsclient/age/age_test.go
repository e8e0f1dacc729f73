package age

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"
)

// pair makes a private key and its recipient, of X25519 or post-quantum.
func pair(t *testing.T, hybrid bool) (identity, recipient string) {
	t.Helper()
	if hybrid {
		k, err := age.GenerateHybridIdentity()
		if err != nil {
			t.Fatal(err)
		}
		return k.String(), k.Recipient().String()
	}
	k, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return k.String(), k.Recipient().String()
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "identity")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func seed() []byte { return bytes.Repeat([]byte("seed"), SeedSize/4) }

// TestWrap wraps for one and for several recipients of each kind: each identity alone opens the
// file, another one does not, and the sizes are those that the documentation gives.
func TestWrap(t *testing.T) {
	for _, test := range []struct {
		name   string
		hybrid bool
		count  int
		size   int
	}{
		{"X25519", false, 1, 232}, {"three of X25519", false, 3, 428},
		{"post-quantum", true, 1, 1691}, {"two post-quantum", true, 2, 3248},
	} {
		t.Run(test.name, func(t *testing.T) {
			var identities, recipients []string
			for range test.count {
				i, r := pair(t, test.hybrid)
				identities, recipients = append(identities, i), append(recipients, r)
			}
			r, err := NewRecipients(recipients)
			if err != nil {
				t.Fatal(err)
			}
			wrapped, err := r.Wrap(seed())
			if err != nil {
				t.Fatal(err)
			}
			if len(wrapped) != test.size {
				t.Errorf("%d bytes, want %d", len(wrapped), test.size)
			}
			if !isWrapped(wrapped) || CheckWrapped(wrapped) != nil {
				t.Error("what was wrapped is not taken for an age file")
			}
			for _, text := range identities {
				ids, err := ReadIdentities(write(t, "# a comment\n\n"+text+"\n"), Prompter{})
				if err != nil {
					t.Fatal(err)
				}
				got, err := ids.Unwrap(wrapped)
				if err != nil || !bytes.Equal(got, seed()) {
					t.Errorf("unwrap: %x, %v", got, err)
				}
			}
			other, _ := pair(t, test.hybrid)
			ids, err := ReadIdentities(write(t, other), Prompter{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ids.Unwrap(wrapped); !errors.Is(err, ErrNoIdentity) {
				t.Errorf("another identity: %v", err)
			}
		})
	}
}

// TestID is the same for the same recipients in any order, and only then.
func TestID(t *testing.T) {
	_, a := pair(t, false)
	_, b := pair(t, false)
	id := func(texts ...string) string {
		r, err := NewRecipients(texts)
		if err != nil {
			t.Fatal(err)
		}
		return r.ID()
	}
	if id(a, b) != id(b, a) || id(a) == id(a, b) || id(a) == id(b) {
		t.Error("the ID does not follow the set of recipients")
	}
}

func TestRefusedRecipients(t *testing.T) {
	identity, x := pair(t, false)
	_, pq := pair(t, true)
	for name, test := range map[string]struct {
		texts []string
		index int
		want  string
	}{
		"none":       {nil, -1, "no recipient"},
		"identity":   {[]string{x, identity}, 1, "identity, which is secret"},
		"nonsense":   {[]string{"hello"}, 0, "is not an age recipient"},
		"truncated":  {[]string{x[:len(x)-1]}, 0, "copy it again"},
		"pq cut":     {[]string{pq[:len(pq)-4]}, 0, "copy it again"},
		"twice":      {[]string{x, x}, 1, "same as recipient 0"},
		"mixed":      {[]string{x, pq}, -1, "cannot be used together"},
		"plugin":     {[]string{"age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t"}, 0, "age-plugin-yubikey"},
		"ssh":        {[]string{"ssh-ed25519 AAAA"}, 0, "is not an age recipient"},
		"passphrase": {[]string{""}, 0, "is not an age recipient"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewRecipients(test.texts)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("%v, want %q", err, test.want)
			}
			if strings.Contains(err.Error(), identity) {
				t.Error("the error quotes a private key")
			}
			got := -1
			if e, ok := errors.AsType[*RecipientError](err); ok {
				got = e.Index
			}
			if got != test.index {
				t.Errorf("index %d, want %d", got, test.index)
			}
		})
	}
	if _, err := ReadRecipients([]byte("# x\n\n" + x + "\r\n" + identity)); err == nil || strings.Contains(err.Error(), identity) {
		t.Errorf("a recipients file with an identity: %v", err)
	}
	got, err := ReadRecipients([]byte("# x\n\n" + x + "\r\n"))
	if err != nil || len(got) != 1 || got[0] != x {
		t.Errorf("%q, %v", got, err)
	}
	many := make([]string, 6)
	for i := range many {
		_, many[i] = pair(t, true)
	}
	if _, err := NewRecipients(many); err == nil || !strings.Contains(err.Error(), "use fewer") {
		t.Errorf("a copy that is too large: %v", err)
	}
}

// TestDamage changes and cuts a wrapped seed everywhere: it never opens, and nothing else happens.
func TestDamage(t *testing.T) {
	identity, recipient := pair(t, false)
	r, err := NewRecipients([]string{recipient})
	if err != nil {
		t.Fatal(err)
	}
	ids, err := ReadIdentities(write(t, identity), Prompter{})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := r.Wrap(seed())
	if err != nil {
		t.Fatal(err)
	}
	for i := range wrapped {
		if _, err := ids.Unwrap(wrapped[:i]); err == nil {
			t.Errorf("cut at %d: it opens", i)
		}
		damaged := bytes.Clone(wrapped)
		damaged[i] ^= 1
		if _, err := ids.Unwrap(damaged); err == nil {
			t.Errorf("changed at %d: it opens", i)
		}
	}
	if _, err := r.Wrap(nil); err == nil {
		t.Error("an empty seed is wrapped")
	}
	// An age file of another size is not a copy.
	var long bytes.Buffer
	w, err := age.Encrypt(&long, r.all...)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(make([]byte, SeedSize+1))
	w.Close()
	if _, err := ids.Unwrap(long.Bytes()); err == nil {
		t.Error("a file with more than a seed opens")
	}
}

// TestProtectedIdentity reads identity files that a passphrase protects, binary and armored.
func TestProtectedIdentity(t *testing.T) {
	identity, recipient := pair(t, false)
	r, err := NewRecipients([]string{recipient})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := r.Wrap(seed())
	if err != nil {
		t.Fatal(err)
	}
	scrypt, err := age.NewScryptRecipient("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	scrypt.SetWorkFactor(10)
	for _, armored := range []bool{false, true} {
		var file bytes.Buffer
		a := armor.NewWriter(&file)
		var to io.Writer = &file
		if armored {
			to = a
		}
		w, err := age.Encrypt(to, scrypt)
		if err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(identity + "\n"))
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if armored {
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
		}
		path := write(t, file.String())
		with := func(passphrase string) Prompter {
			return Prompter{Passphrase: func(name string) ([]byte, error) {
				if name != path {
					t.Errorf("the passphrase of %s is asked for", name)
				}
				return []byte(passphrase), nil
			}}
		}
		ids, err := ReadIdentities(path, with("correct horse"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ids.Unwrap(wrapped); err != nil || !bytes.Equal(got, seed()) {
			t.Errorf("%x, %v", got, err)
		}
		for _, wrong := range []string{"incorrect", ""} {
			if _, err := ReadIdentities(path, with(wrong)); err == nil || !strings.Contains(err.Error(), "passphrase") {
				t.Errorf("passphrase %q: %v", wrong, err)
			}
		}
		if _, err := ReadIdentities(path, Prompter{}); err == nil || !strings.Contains(err.Error(), "no terminal") {
			t.Errorf("without a terminal: %v", err)
		}
	}
}

func TestRefusedIdentityFiles(t *testing.T) {
	identity, recipient := pair(t, false)
	for name, test := range map[string]struct{ text, want string }{
		"empty":     {"# nothing\n", "no identity"},
		"recipient": {recipient, "line 1 is a recipient"},
		"truncated": {"\n" + identity[:len(identity)-1], "line 2 is not an age identity"},
		"plugin":    {"AGE-PLUGIN-YUBIKEY-1QQQQ", "no terminal"},
		"large":     {strings.Repeat("#", maxIdentityFile+1), "larger than"},
	} {
		_, err := ReadIdentities(write(t, test.text), Prompter{})
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), identity[:30]) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	if _, err := ReadIdentities(filepath.Join(t.TempDir(), "none"), Prompter{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// TestProgram has the program age of the system open what was wrapped, which is the recovery of
// last resort in the documentation.
func TestProgram(t *testing.T) {
	program, err := exec.LookPath("age")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("the program age is not installed: apt-get install age")
		}
		t.Skip("the program age is not installed")
	}
	identity, recipient := pair(t, false)
	r, err := NewRecipients([]string{recipient})
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := r.Wrap(seed())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--decrypt", "--identity", write(t, identity))
	cmd.Stdin = bytes.NewReader(wrapped)
	out, err := cmd.Output()
	if err != nil || !bytes.Equal(out, seed()) {
		t.Errorf("%x, %v", out, err)
	}
}

func FuzzCheckWrapped(f *testing.F) {
	k, err := age.GenerateX25519Identity()
	if err != nil {
		f.Fatal(err)
	}
	r, err := NewRecipients([]string{k.Recipient().String()})
	if err != nil {
		f.Fatal(err)
	}
	wrapped, err := r.Wrap(seed())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wrapped)
	f.Add(wrapped[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		if CheckWrapped(b) == nil && !isWrapped(b) {
			t.Error("an age file without its first line")
		}
	})
}
