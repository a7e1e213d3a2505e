//go:build unix

package localpg

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// elsewhere is the folder for clusters, if the user that Postgres runs as cannot reach the
// folder of the server.
const elsewhere = "/var/lib/cedarpost"

// StepDown returns the user that root runs Postgres as, for programs that must not run as
// root. It is nil if this process does not run as root: then they run as its user.
func StepDown() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		u, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// chown gives a file or folder to the user that Postgres runs as.
func (s *Server) chown(path string) error {
	if s.owner == nil {
		return nil
	}
	return os.Chown(path, int(s.owner.Uid), int(s.owner.Gid))
}

// canReach reports whether a user may pass through a folder and all folders above it. It
// does not look at access control lists.
func canReach(who *syscall.Credential, dir string) (bool, error) {
	if who == nil {
		return true, nil
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	for {
		info, err := os.Stat(dir)
		if err != nil {
			return false, err
		}
		stat := info.Sys().(*syscall.Stat_t)
		mode := info.Mode().Perm()
		switch {
		case stat.Uid == who.Uid:
			mode >>= 6
		case stat.Gid == who.Gid:
			mode >>= 3
		}
		if mode&1 == 0 {
			return false, nil
		}
		if dir == filepath.Dir(dir) {
			return true, nil
		}
		dir = filepath.Dir(dir)
	}
}

// place finds the folder of the cluster, or makes it.
func (s *Server) place() error {
	link := filepath.Join(s.config.Dir, "postgres")
	target, err := filepath.EvalSymlinks(link)
	if err == nil {
		s.cluster = target
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	reach, err := canReach(s.owner, s.config.Dir)
	if err != nil {
		return err
	}
	if reach {
		s.cluster = link
		return s.makeCluster()
	}

	if err := os.MkdirAll(elsewhere, 0o755); err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(s.config.Dir))
	s.cluster = filepath.Join(elsewhere, hex.EncodeToString(sum[:6]))
	if _, err := os.Lstat(s.cluster); err == nil {
		// It belongs to a folder that had this name before, and may exist under another name.
		if s.cluster, err = os.MkdirTemp(elsewhere, filepath.Base(s.cluster)+"-"); err != nil {
			return err
		}
	}
	if err := s.makeCluster(); err != nil {
		return err
	}
	os.Remove(link) // if it is a link that leads nowhere
	return os.Symlink(s.cluster, link)
}

func (s *Server) makeCluster() error {
	if err := os.MkdirAll(s.cluster, 0o700); err != nil {
		return err
	}
	return s.chown(s.cluster)
}
