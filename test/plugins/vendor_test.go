package plugins

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
)

var (
	errOutage   = errors.New("the vendor is down")
	errDisabled = errors.New("the key is disabled")
	errForeign  = errors.New("not encrypted with this key")
)

// vendor is a double of a cloud's key service: AES-256-GCM with versions of one key. Its methods
// named after a vendor are that vendor's HTTP API, as far as its plugin uses it. It is safe for
// concurrent use.
type vendor struct {
	mu       sync.Mutex
	keys     []cipher.AEAD
	outage   bool
	disabled bool
}

func newVendor(t *testing.T) *vendor {
	v := &vendor{}
	v.rotate(t)
	return v
}

// rotate adds a version, which encrypts from now on. The others still decrypt.
func (v *vendor) rotate(t *testing.T) {
	t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.keys = append(v.keys, aead)
}

func (v *vendor) setDisabled(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.disabled = on
}

func (v *vendor) setOutage(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.outage = on
}

// version returns the newest version, from 1.
func (v *vendor) version() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.keys)
}

func (v *vendor) usable() error {
	switch {
	case v.outage:
		return errOutage
	case v.disabled:
		return errDisabled
	}
	return nil
}

// encrypt uses the given version, or the newest one if it is 0.
func (v *vendor) encrypt(plaintext []byte, version int) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.usable(); err != nil {
		return nil, err
	}
	if version == 0 {
		version = len(v.keys)
	}
	nonce := make([]byte, 12)
	rand.Read(nonce)
	return v.keys[version-1].Seal(append([]byte{byte(version)}, nonce...), nonce, plaintext, nil), nil
}

func (v *vendor) decrypt(ciphertext []byte) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.usable(); err != nil {
		return nil, err
	}
	if len(ciphertext) < 13 || ciphertext[0] == 0 || int(ciphertext[0]) > len(v.keys) {
		return nil, errForeign
	}
	plaintext, err := v.keys[ciphertext[0]-1].Open(nil, ciphertext[1:13], ciphertext[13:], nil)
	if err != nil {
		return nil, errForeign
	}
	return plaintext, nil
}

// describe is a call that reads the key's description.
func (v *vendor) describe() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.outage {
		return errOutage
	}
	return nil
}

// serve serves an API on loopback until the test ends, and returns its URL.
func serve(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

type object = map[string]any

// aws is the part of AWS KMS that Encrypt and Decrypt are. arn is the ARN of the key.
func (v *vendor) aws(arn string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in struct{ Plaintext, CiphertextBlob []byte }
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			reply(w, http.StatusBadRequest, object{"__type": "SerializationException"})
			return
		}
		out := object{"KeyId": arn, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}
		var err error
		switch r.Header.Get("X-Amz-Target") {
		case "TrentService.Encrypt":
			out["CiphertextBlob"], err = v.encrypt(in.Plaintext, 0)
		case "TrentService.Decrypt":
			out["Plaintext"], err = v.decrypt(in.CiphertextBlob)
		default:
			err = errForeign
		}
		switch {
		case errors.Is(err, errOutage):
			reply(w, http.StatusInternalServerError, object{"__type": "KMSInternalException"})
		case errors.Is(err, errDisabled):
			reply(w, http.StatusBadRequest, object{"__type": "DisabledException", "message": arn + " is disabled."})
		case err != nil:
			reply(w, http.StatusBadRequest, object{"__type": "InvalidCiphertextException"})
		default:
			reply(w, http.StatusOK, out)
		}
	}
}

// transit is the part of Vault's transit engine that a plugin with a token uses. A key of Vault
// cannot be disabled: instead, the token loses its policy.
func (v *vendor) transit(w http.ResponseWriter, r *http.Request) {
	var in struct{ Plaintext, Ciphertext string }
	if r.Method != http.MethodGet && json.NewDecoder(r.Body).Decode(&in) != nil {
		reply(w, http.StatusBadRequest, object{"errors": []string{"failed to parse JSON input"}})
		return
	}
	data := object{}
	var err error
	switch path := strings.TrimPrefix(r.URL.Path, "/v1/"); path {
	case "auth/token/lookup-self", "auth/token/renew-self":
		data = object{"ttl": 3600, "renewable": true}
	case "transit/keys/kms":
		if err = v.describe(); err == nil && v.isDisabled() {
			err = errDisabled
		}
		data = object{"latest_version": v.version(), "name": "kms", "type": "aes256-gcm96"}
	case "transit/encrypt/kms":
		var plaintext, ciphertext []byte
		if plaintext, err = base64.StdEncoding.DecodeString(in.Plaintext); err == nil {
			ciphertext, err = v.encrypt(plaintext, 0)
		}
		if err == nil {
			data = object{"ciphertext": fmt.Sprintf("vault:v%d:%s", ciphertext[0], base64.StdEncoding.EncodeToString(ciphertext[1:])), "key_version": int(ciphertext[0])}
		}
	case "transit/decrypt/kms":
		err = errForeign
		if parts := strings.SplitN(in.Ciphertext, ":", 3); len(parts) == 3 {
			version, _ := strconv.Atoi(strings.TrimPrefix(parts[1], "v"))
			rest, _ := base64.StdEncoding.DecodeString(parts[2])
			var plaintext []byte
			plaintext, err = v.decrypt(append([]byte{byte(version)}, rest...))
			data = object{"plaintext": base64.StdEncoding.EncodeToString(plaintext)}
		}
	default:
		reply(w, http.StatusNotFound, object{"errors": []string{}})
		return
	}
	switch {
	case errors.Is(err, errOutage):
		reply(w, http.StatusServiceUnavailable, object{"errors": []string{"Vault is sealed"}})
	case errors.Is(err, errDisabled):
		reply(w, http.StatusForbidden, object{"errors": []string{"1 error occurred:\n\t* permission denied\n\n"}})
	case err != nil:
		reply(w, http.StatusBadRequest, object{"errors": []string{"cipher: message authentication failed"}})
	default:
		reply(w, http.StatusOK, object{"data": data})
	}
}

func (v *vendor) isDisabled() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.disabled
}

// google is the part of Cloud KMS that Encrypt and Decrypt are. name is the resource of the key.
func (v *vendor) google(name string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in struct{ Plaintext, Ciphertext []byte }
		var out object
		err := json.NewDecoder(r.Body).Decode(&in)
		switch {
		case err != nil:
		case r.URL.Path == "/v1/"+name+":encrypt":
			var ciphertext []byte
			if ciphertext, err = v.encrypt(in.Plaintext, 0); err == nil {
				out = object{"name": fmt.Sprintf("%s/cryptoKeyVersions/%d", name, ciphertext[0]), "ciphertext": ciphertext}
			}
		case r.URL.Path == "/v1/"+name+":decrypt":
			var plaintext []byte
			plaintext, err = v.decrypt(in.Ciphertext)
			out = object{"plaintext": plaintext}
		default:
			err = errForeign
		}
		fail := func(code int, status string) {
			reply(w, code, object{"error": object{"code": code, "message": "refused", "status": status}})
		}
		switch {
		case errors.Is(err, errOutage):
			fail(http.StatusServiceUnavailable, "UNAVAILABLE")
		case errors.Is(err, errDisabled):
			fail(http.StatusBadRequest, "FAILED_PRECONDITION")
		case err != nil:
			fail(http.StatusBadRequest, "INVALID_ARGUMENT")
		default:
			reply(w, http.StatusOK, out)
		}
	}
}

// openstack is the part of Keystone and Barbican that returns a secret: the plugin encrypts itself.
// base returns the URL of the server.
func (v *vendor) openstack(base func() string, secretID string, secret []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/auth/tokens"):
			w.Header().Set("X-Subject-Token", "token")
			endpoint := object{"id": "1", "interface": "public", "region": "R", "region_id": "R", "url": base() + "/key-manager/"}
			reply(w, http.StatusCreated, object{"token": object{
				"expires_at": "2099-01-01T00:00:00.000000Z", "issued_at": "2026-01-01T00:00:00.000000Z", "methods": []string{"password"},
				"catalog": []object{{"id": "1", "type": "key-manager", "name": "barbican", "endpoints": []object{endpoint}}},
			}})
		case strings.HasSuffix(r.URL.Path, "/secrets/"+secretID+"/payload"):
			err := v.describe()
			switch {
			case err != nil:
				reply(w, http.StatusServiceUnavailable, object{"title": "Service Unavailable"})
			case v.isDisabled():
				reply(w, http.StatusForbidden, object{"title": "Forbidden"})
			default:
				w.Header().Set("Content-Type", "application/octet-stream")
				w.Write(secret)
			}
		case strings.HasPrefix(r.URL.Path, "/key-manager"):
			// the versions of Barbican
			reply(w, http.StatusOK, object{"versions": []object{{"id": "v1", "status": "CURRENT", "links": []object{{"rel": "self", "href": base() + "/key-manager/v1/"}}}}})
		default:
			// the versions of Keystone
			reply(w, http.StatusOK, object{"versions": object{"values": []object{{"id": "v3.14", "status": "stable", "links": []object{{"rel": "self", "href": base() + "/v3/"}}}}}})
		}
	}
}

// stackit is the part of STACKIT's KMS that encrypts and decrypts. Its data is base64 without
// padding, within the base64 of JSON.
func (v *vendor) stackit(w http.ResponseWriter, r *http.Request) {
	var in struct{ Data []byte }
	err := json.NewDecoder(r.Body).Decode(&in)
	var data []byte
	if err == nil {
		data, err = base64.RawStdEncoding.DecodeString(string(in.Data))
	}
	switch {
	case err != nil:
	case strings.HasSuffix(r.URL.Path, "/encrypt"):
		data, err = v.encrypt(data, 0)
	default:
		data, err = v.decrypt(data)
	}
	if err != nil {
		reply(w, http.StatusBadRequest, object{"message": "refused"})
		return
	}
	reply(w, http.StatusOK, object{"data": []byte(base64.RawStdEncoding.EncodeToString(data))})
}

// ovh is the part of OVHcloud's KMS that describes, encrypts with and decrypts with one key.
func (v *vendor) ovh(domain, key string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		rest, ours := strings.CutPrefix(r.URL.Path, "/api/"+domain+"/v1/servicekey/"+key)
		body, _ := io.ReadAll(r.Body)
		var in struct {
			Plaintext  []byte
			Ciphertext string
		}
		var out object
		err := errForeign
		switch {
		case !ours:
		case rest == "" && r.Method == http.MethodGet:
			err = v.describe()
			state := "active"
			if v.isDisabled() {
				state = "deactivated"
			}
			out = object{"id": key, "name": "kms", "attributes": object{"state": state}}
		case rest == "/encrypt" && json.Unmarshal(body, &in) == nil:
			var data []byte
			data, err = v.encrypt(in.Plaintext, 0)
			out = object{"ciphertext": base64.StdEncoding.EncodeToString(data)}
		case rest == "/decrypt" && json.Unmarshal(body, &in) == nil:
			var data []byte
			if data, err = base64.StdEncoding.DecodeString(in.Ciphertext); err == nil {
				data, err = v.decrypt(data)
			}
			out = object{"plaintext": data}
		}
		switch {
		case errors.Is(err, errOutage):
			reply(w, http.StatusServiceUnavailable, object{"error_code": 17301504, "error_id": "1", "errors": []string{"unavailable"}})
		case errors.Is(err, errDisabled):
			reply(w, http.StatusForbidden, object{"error_code": 17125376, "error_id": "1", "errors": []string{"the key is not active"}})
		case err != nil:
			reply(w, http.StatusBadRequest, object{"error_code": 17125377, "error_id": "1", "errors": []string{"bad request"}})
		default:
			reply(w, http.StatusOK, out)
		}
	}
}
