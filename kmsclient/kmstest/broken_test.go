package kmstest

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// bent is a Memory with some of its methods replaced.
type bent struct {
	*Memory
	encrypt  func(context.Context, []byte) (*service.EncryptResponse, error)
	decrypt  func(context.Context, *service.DecryptRequest) ([]byte, error)
	status   func(context.Context) (*service.StatusResponse, error)
	generate func(context.Context) (*kmsclient.DataKey, error)
}

func (b *bent) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	if b.encrypt != nil {
		return b.encrypt(ctx, data)
	}
	return b.Memory.Encrypt(ctx, uid, data)
}

func (b *bent) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	if b.decrypt != nil {
		return b.decrypt(ctx, req)
	}
	return b.Memory.Decrypt(ctx, uid, req)
}

func (b *bent) Status(ctx context.Context) (*service.StatusResponse, error) {
	if b.status != nil {
		return b.status(ctx)
	}
	return b.Memory.Status(ctx)
}

func (b *bent) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
	if b.generate != nil {
		return b.generate(ctx)
	}
	return b.Memory.GenerateDataKey(ctx, uid)
}

// broken are backends with one fault each, and the checks that refuse them.
var broken = map[string]struct {
	bend func(b *bent)
	want []string // each of these has to fail, others may
}{
	"identity": {func(b *bent) {
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			return &service.EncryptResponse{Ciphertext: bytes.Clone(data), KeyID: "memory/1"}, ctx.Err()
		}
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			return bytes.Clone(req.Ciphertext), ctx.Err()
		}
	}, []string{"wrapped secrets", "damaged ciphertext", "unknown key"}},
	"plaintext in annotation": {func(b *bent) {
		b.encrypt = altered(b, func(data []byte, res *service.EncryptResponse) {
			res.Annotations["copy.example.com"] = bytes.Clone(data)
		})
	}, []string{"limits of answers"}},
	"plain annotation name": {func(b *bent) {
		b.encrypt = altered(b, func(_ []byte, res *service.EncryptResponse) { res.Annotations["plain"] = nil })
	}, []string{"limits of answers"}},
	"no key ID": {func(b *bent) {
		b.encrypt = altered(b, func(_ []byte, res *service.EncryptResponse) { res.KeyID = "" })
	}, []string{"limits of answers", "status", "round trips"}},
	"long ciphertext": {func(b *bent) {
		b.encrypt = altered(b, func(_ []byte, res *service.EncryptResponse) {
			res.Ciphertext = append(res.Ciphertext, make([]byte, 1024)...)
		})
	}, []string{"limits of answers"}},
	"deterministic": {func(b *bent) {
		var first *service.EncryptResponse
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			res, err := b.Memory.Encrypt(ctx, "", data)
			if first == nil {
				first = res
			}
			return first, err
		}
	}, []string{"wrapped secrets"}},
	"ignores the context": {func(b *bent) {
		b.encrypt = func(_ context.Context, data []byte) (*service.EncryptResponse, error) {
			return b.Memory.Encrypt(context.Background(), "", data)
		}
	}, []string{"cancelled", "deadline"}},
	"hides the context's error": {func(b *bent) {
		b.status = func(ctx context.Context) (*service.StatusResponse, error) {
			if ctx.Err() != nil {
				return nil, errors.New("gone")
			}
			return b.Memory.Status(ctx)
		}
	}, []string{"cancelled", "deadline"}},
	"retains Encrypt's argument": {func(b *bent) {
		seen := map[string][]byte{}
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			res, err := b.Memory.Encrypt(ctx, "", data)
			if err == nil {
				seen[string(res.Ciphertext)] = data
			}
			return res, err
		}
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			if data, ok := seen[string(req.Ciphertext)]; ok && ctx.Err() == nil {
				return bytes.Clone(data), nil
			}
			return b.Memory.Decrypt(ctx, "", req)
		}
	}, []string{"arguments"}},
	"changes Encrypt's argument": {func(b *bent) {
		b.encrypt = altered(b, func(data []byte, _ *service.EncryptResponse) { clear(data) })
	}, []string{"arguments"}},
	"unwraps in place": {func(b *bent) {
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			data, err := b.Memory.Decrypt(ctx, "", req)
			return append(req.Ciphertext[:0], data...), err
		}
	}, []string{"arguments"}},
	"answers from a cache": {func(b *bent) {
		cache := map[string][]byte{}
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			if data, ok := cache[string(req.Ciphertext)]; ok && ctx.Err() == nil {
				return data, nil
			}
			data, err := b.Memory.Decrypt(ctx, "", req)
			if err == nil {
				cache[string(req.Ciphertext)] = data
			}
			return data, err
		}
	}, []string{"results"}},
	"one status for all": {func(b *bent) {
		s := &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "memory/1"}
		b.status = func(ctx context.Context) (*service.StatusResponse, error) { return s, ctx.Err() }
	}, []string{"results"}},
	"ignores damage": {func(b *bent) {
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			if data, err := b.Memory.Decrypt(ctx, "", req); err == nil || ctx.Err() != nil {
				return data, err
			}
			return []byte("anything"), nil
		}
	}, []string{"damaged ciphertext", "unknown key"}},
	"ignores a cut tail": {func(b *bent) {
		b.encrypt = altered(b, func(_ []byte, res *service.EncryptResponse) { res.Ciphertext = append(res.Ciphertext, 0) })
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			ignored := clone(req)
			ignored.Ciphertext = ignored.Ciphertext[:min(60, len(ignored.Ciphertext))]
			return b.Memory.Decrypt(ctx, "", ignored)
		}
	}, []string{"damaged ciphertext"}},
	"damage may pass": {func(b *bent) {
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			data, err := b.Memory.Decrypt(ctx, "", req)
			if err != nil && ctx.Err() == nil {
				err = &kmsclient.Error{Reason: kmsclient.Unreachable}
			}
			return data, err
		}
	}, []string{"damaged ciphertext", "unknown key"}},
	"damage without class": {func(b *bent) {
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			data, err := b.Memory.Decrypt(ctx, "", req)
			if err != nil && ctx.Err() == nil {
				err = errors.New("no")
			}
			return data, err
		}
	}, []string{"damaged ciphertext", "unknown key"}},
	"damage is of no key": {func(b *bent) {
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			data, err := b.Memory.Decrypt(ctx, "", req)
			if err != nil && ctx.Err() == nil {
				err = &kmsclient.Error{Reason: kmsclient.KeyDisabled}
			}
			return data, err
		}
	}, []string{"damaged ciphertext"}},
	"unwraps whatever came last": {func(b *bent) {
		var mu sync.Mutex
		var last []byte
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			mu.Lock()
			defer mu.Unlock()
			last = bytes.Clone(data)
			return b.Memory.Encrypt(ctx, "", data)
		}
		b.decrypt = func(context.Context, *service.DecryptRequest) ([]byte, error) {
			mu.Lock()
			defer mu.Unlock()
			return bytes.Clone(last), nil
		}
	}, []string{"concurrency"}},
	"cuts what is too long": {func(b *bent) {
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			return b.Memory.Encrypt(ctx, "", data[:min(6<<10, len(data))])
		}
	}, []string{"too long"}},
	"hides the context's error, under way": {func(b *bent) {
		b.status = func(ctx context.Context) (*service.StatusResponse, error) {
			<-ctx.Done()
			return nil, errors.New("gone")
		}
	}, []string{"cancelled under way"}},
	"wrong key ID in Status": {func(b *bent) {
		b.status = func(ctx context.Context) (*service.StatusResponse, error) {
			return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: "memory/0"}, ctx.Err()
		}
	}, []string{"status", "data keys"}},
	"not healthy": {func(b *bent) {
		b.status = func(ctx context.Context) (*service.StatusResponse, error) {
			return &service.StatusResponse{Version: "v2", Healthz: "no", KeyID: "memory/1"}, ctx.Err()
		}
	}, []string{"status"}},
	"no answer": {func(b *bent) {
		b.status = func(ctx context.Context) (*service.StatusResponse, error) { return nil, ctx.Err() }
	}, []string{"status"}},
	"constant data key": {func(b *bent) {
		b.generate = func(ctx context.Context) (*kmsclient.DataKey, error) {
			key := []byte(strings.Repeat("k", 32))
			res, err := b.Memory.Encrypt(ctx, "", key)
			if err != nil {
				return nil, err
			}
			return &kmsclient.DataKey{Plaintext: key, Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations}, nil
		}
	}, []string{"data keys"}},
	"short data key": {func(b *bent) {
		b.generate = func(ctx context.Context) (*kmsclient.DataKey, error) {
			key, err := b.Memory.GenerateDataKey(ctx, "")
			if err == nil {
				key.Plaintext = key.Plaintext[:16]
			}
			return key, err
		}
	}, []string{"data keys"}},
	"keeps the data key": {func(b *bent) {
		made := map[string][]byte{}
		b.generate = func(ctx context.Context) (*kmsclient.DataKey, error) {
			key, err := b.Memory.GenerateDataKey(ctx, "")
			if err == nil {
				made[string(key.Ciphertext)] = key.Plaintext
			}
			return key, err
		}
		b.decrypt = func(ctx context.Context, req *service.DecryptRequest) ([]byte, error) {
			if key, ok := made[string(req.Ciphertext)]; ok {
				return key, nil
			}
			return b.Memory.Decrypt(ctx, "", req)
		}
	}, []string{"data keys"}},
	"plaintext in an error":            {quoting(func(data []byte) string { return fmt.Sprintf("cannot wrap %q", data) }), []string{"cancelled", "deadline"}},
	"plaintext in an error, in base64": {quoting(base64.StdEncoding.EncodeToString), []string{"cancelled", "deadline"}},
	"plaintext in an error, in hex":    {quoting(func(data []byte) string { return fmt.Sprintf("%x", data) }), []string{"cancelled", "deadline"}},
	"plaintext in an error, as bytes":  {quoting(func(data []byte) string { return fmt.Sprintf("%d", data) }), []string{"cancelled", "deadline"}},
}

// altered is an Encrypt whose answer, or argument, is altered.
func altered(b *bent, alter func([]byte, *service.EncryptResponse)) func(context.Context, []byte) (*service.EncryptResponse, error) {
	return func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
		res, err := b.Memory.Encrypt(ctx, "", data)
		if err == nil {
			alter(data, res)
		}
		return res, err
	}
}

// quoting is an Encrypt that quotes its argument when the context has ended.
func quoting(quote func([]byte) string) func(b *bent) {
	return func(b *bent) {
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("%s: %w", quote(data), err)
			}
			return b.Memory.Encrypt(ctx, "", data)
		}
	}
}

func newBroken(name string) kmsclient.Service {
	b := &bent{Memory: NewMemory()}
	broken[name].bend(b)
	return b
}
